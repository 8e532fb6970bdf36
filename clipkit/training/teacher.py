"""A frozen teacher in training: its features of each batch's pairs, and its part in the loss. It is encoded elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clipkit.losses import distill_loss
from clipkit.training.atomic_files import write_text_atomically


class FeatureTable:
    """Features (N, T) that are found by 63-bit ids; on the host, where they may be a mapped file."""

    def __init__(self, ids: Tensor, features: Tensor) -> None:
        self.ids, self.rows = ids.sort()  # (N,), (N,); of equal ids the features are equal
        self.features = features

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look ids (B,) up. Returns (B, T), and which of the rows are right: (B,) bool."""
        places = torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)  # (B,)
        return self.features[self.rows[places]], self.ids[places] == ids


class Teacher:
    """What a teacher made of all pictures and captions of the training data.

    Attributes:
      terms: The parts of the last loss, by name.
    """

    def __init__(self, images: FeatureTable, captions: FeatureTable, logit_scale: float, *, weight: float, cure: str) -> None:
        """
        Args:
          images, captions: By the ids that `data.samples.teacher_ids` gives.
          logit_scale: Of the teacher, 1/temperature.
          weight: Share of the distillation in the loss, 0 to 1.
          cure: What to do about a pair that is not there, for the message.
        """
        self.images, self.captions, self.logit_scale = images, captions, logit_scale
        self.weight, self.cure = weight, cure
        self.terms: dict[str, Tensor] = {}

    def beside(self, own_loss: Callable[..., Tensor], ids: Tensor) -> Callable[..., Tensor]:
        """Put the distillation of a batch beside its own loss.

        Args:
          own_loss: Of image_features (B, D), text_features (B, D), logit_scale and logit_bias.
          ids: (B, 2) int64 on the host: of the pictures and of the captions.

        Returns:
          A function of the same arguments: (1 - weight) x own loss + weight x distillation.

        Raises:
          ValueError: the teacher has not seen a pair.
        """
        image_ids, caption_ids = ids.T.contiguous()  # (B,) each
        (image_features, has_image), (text_features, has_text) = self.images.find(image_ids), self.captions.find(caption_ids)
        num_missing = int((~(has_image & has_text)).sum())
        if num_missing:
            raise ValueError(f"the teacher has no features of {num_missing} of the {len(ids)} pairs of a batch; {self.cure}")

        def loss(image_rows: Tensor, text_rows: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
            own = own_loss(image_rows, text_rows, logit_scale, logit_bias)
            distilled = distill_loss(
                image_rows, text_rows, logit_scale, teacher_logit_scale=self.logit_scale,
                teacher_image_features=image_features.to(image_rows.device, non_blocking=True),
                teacher_text_features=text_features.to(image_rows.device, non_blocking=True))
            self.terms = {"contrastive_loss": own.detach(), "distillation_loss": distilled.detach()}
            return (1 - self.weight) * own + self.weight * distilled

        return loss


def keep_teacher(run_dir: Path, teacher: str, weights_sha256: str, *, is_main: bool) -> None:
    """Write teacher.json into a run; refuse to go on with a teacher whose weights have changed since.

    Raises:
      ValueError: the run learned from other weights.
    """
    file = run_dir / "teacher.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))["weights_sha256"]
        if before != weights_sha256:
            raise ValueError(f"the run {run_dir} learned from other weights than {teacher} holds (sha256 {before[:12]}, now "
                             f"{weights_sha256[:12]}); put those back, or give another name=...")
    elif is_main:
        write_text_atomically(file, json.dumps({"teacher": teacher, "weights_sha256": weights_sha256}, indent=1) + "\n")
