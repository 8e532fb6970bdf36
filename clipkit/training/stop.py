"""SIGTERM and Ctrl-C: a wish to stop, that the loop grants at its next good moment."""

import signal
from types import FrameType, TracebackType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on


class StopRequest:
    """While entered, the first SIGTERM or SIGINT sets `wanted`; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.wanted = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(number, self.before[number])  # pyright: ignore[reportArgumentType]
