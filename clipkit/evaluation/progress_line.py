"""A live line that counts pictures, or other units, while they are encoded."""

import sys
from types import TracebackType
from typing import Self

from clipkit.training.live_line import LiveLine


class ProgressLine:
    """`with ProgressLine("task x: ", is_main) as line: encode_task(..., progress=line.show)`; one process shows it."""

    def __init__(self, prefix: str, is_main: bool, *, unit: str = "images") -> None:
        self.prefix, self.unit, self.line = prefix, unit, LiveLine(sys.stdout) if is_main else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.line:
            self.line.close()

    def show(self, done: int, total: int | None) -> None:
        """Show that so many are done; total None = not known."""
        if self.line:
            self.line.update(f"{self.prefix}{done:,}{f' of {total:,}' if total else ''} {self.unit}")
