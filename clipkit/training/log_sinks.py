"""Where scalars go besides metrics.jsonl: TensorBoard event files and wandb, each imported only when asked for."""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkit.training.atomic_files import write_text_atomically


class Sink:
    """Takes the scalars of a step."""

    def __init__(self, run_dir: Path, resume_step: int, config: dict[str, Any]) -> None: ...
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardSink(Sink):
    """An event file, written at once and in this thread.

    torch's SummaryWriter writes in a thread of its own: a full disk ends that thread with a traceback and is met by no
    one, and loader workers are forked beside it.
    """

    def __init__(self, run_dir: Path, resume_step: int, config: dict[str, Any]) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ValueError("log.to names tensorboard, which is not installed; run `pip install tensorboard`, or give "
                             "log.to=[]") from error
        self.events: Any = event_pb2  # protobuf makes the names in these modules at import: Any, for pyright
        self.summaries: Any = summary_pb2
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{platform.node()}.{os.getpid()}.{rest}"
        self.file = (run_dir / name).open("wb", buffering=0)
        self.writer = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        if resume_step:  # TensorBoard hides what older files hold from here on
            self._write(step=resume_step + 1, session_log=self.events.SessionLog(status=self.events.SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        points = [self.summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self.summaries.Summary(value=points))

    def close(self) -> None:
        self.file.close()

    def _write(self, **content: Any) -> None:
        self.writer.write(self.events.Event(wall_time=time.time(), **content).SerializeToString())


class WandbSink(Sink):
    def __init__(self, run_dir: Path, resume_step: int, config: dict[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("log.to names wandb, which is not installed; run `pip install wandb`, or give "
                             "log.to=[tensorboard]") from error
        id_file = run_dir / "wandb_id"
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        self.run = wandb.init(project="clipkit", name=run_dir.name, id=known, dir=str(run_dir), resume="allow",
                              config=config)
        write_text_atomically(id_file, self.run.id + "\n")
        # Our own axis: wandb's counter only rises, and would drop what a resumed run repeats.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
