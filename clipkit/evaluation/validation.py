"""The loss on pairs that were set aside from training, and when it has stopped falling."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clipkit.config.data import DataConfig
from clipkit.config.pretrain import PretrainConfig
from clipkit.data.decode import decode_image
from clipkit.data.tars import RawSample, read_shard
from clipkit.data.validation import FOLDER, Drawn, Split, draw_validation
from clipkit.evaluation.feature_rows import evaluation_mode, ranks_of
from clipkit.evaluation.progress_line import ProgressLine
from clipkit.model.image_text import ImageTextModel
from clipkit.training.atomic_files import write_text_atomically
from clipkit.training.distributed import Process, from_main, mean_over_processes, on_main

LOSSES = "losses.json"  # in the folder of the pairs: [[step, loss], ...]


class Verdict(NamedTuple):
    """What a measurement says."""

    record: dict[str, Any]  # as the log takes it
    wants_checkpoint: bool  # the model is the one to keep, or the run ends here
    is_over: bool  # for `patience` measurements no loss was lower


class Validation:
    """The losses of one run on its own pairs. All processes measure together and hold the same numbers.

    Attributes:
      losses: (step, loss) of each measurement.
    """

    def __init__(self, drawn: Drawn, split: Split, *, patience: int | None, step: int, is_main: bool) -> None:
        """
        Args:
          drawn: The pairs.
          split: What they were drawn by.
          patience: Measurements without a lower loss after which it is over; None = never.
          step: Steps done; measurements of later ones, of a run that was killed, are forgotten.
          is_main: Whether this process writes.
        """
        self.drawn, self.split, self.patience, self.is_main = drawn, split, patience, is_main
        file = drawn.folder / LOSSES
        known = json.loads(file.read_text(encoding="utf-8")) if is_main and file.exists() else []
        self.losses: list[tuple[int, float]] = [(at, loss) for at, loss in from_main(known) if at <= step]

    @property
    def best_step(self) -> int | None:
        """The step of the lowest loss; None before the first."""
        return min(self.losses, key=lambda one: one[1])[0] if self.losses else None

    @property
    def is_over(self) -> bool:
        after_best = sum(step > (self.best_step or 0) for step, _ in self.losses)
        return self.patience is not None and after_best >= self.patience

    def keeps(self, step: int) -> bool:
        """Whether the model of this step is the one to keep: with patience, that of the lowest loss."""
        return self.patience is None or self.best_step in (None, step)

    def measure(self, model: ImageTextModel, step: int, loss_function: Callable[..., Tensor], *, batch_size: int,
                masked: bool) -> Verdict:
        """Measure the loss after `step` steps, and write it down; arguments as in `validation_loss`.

        Raises:
          ValueError: it is not finite.
        """
        loss = validation_loss(model, self.drawn, loss_function, batch_size=batch_size, masked=masked)
        if not math.isfinite(loss):
            raise ValueError(f"the validation loss is {loss} after {step} steps; lower optim.lr, or look at the data")
        self.losses.append((step, loss))
        if self.is_main:
            write_text_atomically(self.drawn.folder / LOSSES, json.dumps(self.losses) + "\n")
        record = {"task": "validation", "metric": "loss", "value": loss, "n": self.drawn.num_pairs}
        return Verdict(record, self.patience is not None and (self.best_step == step or self.is_over), self.is_over)


def open_validation(config: PretrainConfig, data: DataConfig, run_dir: Path, shards: Sequence[str], process: Process, *,
                    step: int) -> Validation:
    """Draw the pairs of a run, or take those drawn before. All processes call it; rank 0 reads and writes.

    Args:
      config: Its `train.validation_fraction` is not None.
      data: As `with_captions` gives it.
      run_dir: The run's folder.
      shards: All of the training data.
      process: This one.
      step: Steps done.

    Raises:
      ValueError: as `draw_validation`.
      OSError: the pairs cannot be written.
    """
    split = Split(fraction=config.train.validation_fraction or 0, seed=config.seed)
    with ProgressLine("setting validation pairs aside: ", process.is_main, unit="samples") as line:
        drawn = on_main(lambda: draw_validation(run_dir / FOLDER, shards, split, data=data, show=line.show,
                                                group_by=config.loss.mask_false_negatives))
    drawn = from_main(drawn)
    if process.is_main:
        print(f"validation {drawn.num_pairs:,} pairs are set aside, in {drawn.folder}", flush=True)
    return Validation(drawn, split, patience=config.train.patience, step=step, is_main=process.is_main)


def validation_loss(model: ImageTextModel, drawn: Drawn, loss_function: Callable[..., Tensor], *, batch_size: int,
                    masked: bool) -> float:
    """The mean loss over batches of the pairs, as the model is evaluated: no augmentation, fp32.

    The pairs are cut into equal batches of at least `batch_size`, on which the loss depends (of all, where there are fewer).
    Over several processes each encodes its rows of each batch; all must call this.

    Args:
      model: Left in the mode it was in.
      drawn: The pairs.
      loss_function: Of `make_loss`.
      batch_size: Pairs that are contrasted, over all processes.
      masked: Whether pairs of one group are no negatives of each other.

    Raises:
      ValueError: there are fewer pairs than processes.
    """
    rank, world_size = ranks_of(True)
    num_batches = max(1, drawn.num_pairs // batch_size)
    own = drawn.num_pairs // num_batches // world_size  # rows of this process in a batch
    if not own:
        raise ValueError(f"{drawn.num_pairs} validation pairs are fewer than the {world_size} processes; give a larger "
                         "train.validation_fraction, or fewer processes")
    losses = []
    with evaluation_mode(model):
        rows = (raw for number, raw in enumerate(_kept(drawn.folder))
                if number < num_batches * own * world_size and number // own % world_size == rank)
        for pairs in zip(*[rows] * own, strict=True):
            images = torch.stack([model.preprocess(picture(raw, drawn.max_pixels)) for raw in pairs])
            tokens = model.tokenize([(raw.text or b"").decode() for raw in pairs])  # (own, L)
            groups = torch.tensor([json.loads(raw.json or b"{}")["group_id"] for raw in pairs])
            features = model(images.to(model.device), tokens if model.trims_text else tokens.to(model.device))
            losses.append(loss_function(*features, group_ids=groups.to(model.device) if masked else None))
    return mean_over_processes(torch.stack(losses).mean()).item()


def picture(raw: RawSample, max_pixels: int) -> Image.Image:
    return Image.fromarray(decode_image(raw.image or b"", max_pixels=max_pixels))


def _kept(folder: Path) -> Iterator[RawSample]:
    items = chain.from_iterable(read_shard(str(shard)) for shard in sorted(folder.glob("*.tar")))
    return (item for item in items if isinstance(item, RawSample))
