"""SIGTERM, Ctrl-C and SIGUSR1: a wish to stop, that the loop grants at its next good moment."""

import signal
from types import FrameType, TracebackType

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is what Slurm is asked to send before the time is up
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on


class StopRequest:
    """While entered, the first of SIGNALS sets `wanted`; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.wanted = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]:
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(number, self.before[number])  # pyright: ignore[reportArgumentType]
