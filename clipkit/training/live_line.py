"""The line that a person watches: rewritten in place on a terminal, printed now and then into a log file."""

import shutil
import time
from collections.abc import Callable
from typing import TextIO

from clipkit.config.visible import visible


class LiveLine:
    """One status line on a stream, and full lines (`say`) that do not tear it."""

    def __init__(self, stream: TextIO, *, plain_seconds: float = 10.0, terminal_seconds: float = 0.1,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
          stream: Usually sys.stdout.
          plain_seconds: Least time between two lines where the stream is no terminal.
          terminal_seconds: Least time between two rewrites on a terminal.
          clock: Seconds; tests give their own.
        """
        self.stream = stream
        self.on_terminal = stream.isatty()
        self.every_seconds = terminal_seconds if self.on_terminal else plain_seconds
        self.clock = clock
        self.shown_at: float | None = None
        self.shown = ""  # what stands on the terminal's last line

    def update(self, text: str, *, always: bool = False) -> None:
        """Show `text` as the status; left out if the last one was shown a moment ago, unless `always`."""
        time_now = self.clock()
        if not always and self.shown_at is not None and time_now - self.shown_at < self.every_seconds:
            return
        self.shown_at = time_now
        if self.on_terminal:
            self.shown = text[: max(1, shutil.get_terminal_size().columns - 1)]
            self._write(f"\r{self.shown}\x1b[K")
        else:
            self._write(text + "\n")

    def say(self, text: str) -> None:
        """Print a full line; on a terminal it goes above the status."""
        if self.on_terminal and self.shown:
            self._write(f"\r\x1b[K{visible(text)}\n{self.shown}")
        else:
            self._write(visible(text) + "\n")

    def close(self) -> None:
        """Leave the last status standing and end its line."""
        if self.on_terminal and self.shown:
            self._write("\n")
            self.shown = ""

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
