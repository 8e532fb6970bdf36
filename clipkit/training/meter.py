"""The numbers of the steps between two log lines, kept on the device until then."""

import math
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipkit.losses import in_batch_accuracy
from clipkit.losses.gather import world_size
from clipkit.model.image_text import Features
from clipkit.training.distributed import gather_objects, mean_over_processes


class TrainingDivergedError(ValueError):
    """Too many steps in a row had a non-finite loss or gradient."""


class Meter:
    """Sums up losses, gradient norms and skipped steps without making the host wait."""

    def __init__(self, *, global_batch_size: int, num_samples: int | None, max_skipped_steps: int,
                 device: torch.device) -> None:
        self.global_batch_size, self.num_samples = global_batch_size, num_samples
        self.max_skipped_steps, self.device = max_skipped_steps, device
        self.in_a_row = torch.zeros((), device=device)
        self.longest = torch.zeros((), device=device)
        self.skipped = 0
        self.losses: list[Tensor] = []
        self.grad_norms: list[Tensor] = []
        self.skips: list[Tensor] = []
        self.terms: list[Mapping[str, Tensor]] = []

    def add(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor, terms: Mapping[str, Tensor] | None = None) -> None:
        """Take in one step: scalars on the device; `skipped` is 1 or 0; `terms` are parts of the loss, by name."""
        self.losses.append(loss.detach())
        self.grad_norms.append(grad_norm.detach())
        self.skips.append(skipped)
        if terms:
            self.terms.append(terms)
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.longest = torch.maximum(self.longest, self.in_a_row)

    def take(self, done: int, *, lr: float, bad: dict[str, int], by_source: Mapping[str, dict[str, int]] | None = None,
             features: Features | None = None) -> dict[str, Any]:
        """Return the metrics since the last call, means over steps and processes, and begin anew.

        Args:
          done: Steps done.
          lr: Learning rate of the last step.
          bad: This process's bad samples by cause, since the run began.
          by_source: Further counts like `bad`, each under its own name: of samples by source.
          features: Of the last step, where the model is a CLIP.

        Raises:
          TrainingDivergedError: more steps in a row than allowed were skipped.
        """
        alone = features is not None and not self.terms  # the loss is the contrastive one, which log(batch) bounds
        named = {name: torch.stack([step[name] for step in self.terms]).mean() for name in (self.terms or [{}])[0]}
        if features:
            names = ("in_batch_accuracy_image_to_text", "in_batch_accuracy_text_to_image")
            named |= zip(names, in_batch_accuracy(features.image_features, features.text_features), strict=True)
        finite = torch.stack(self.losses).nan_to_num(nan=math.inf, posinf=math.inf)
        values = torch.stack([finite.mean(), torch.stack(self.grad_norms).mean(), torch.stack(self.skips).sum(), self.longest,
                              *named.values()])
        loss, grad_norm, skipped, longest, *means = mean_over_processes(values).tolist()
        self.skipped += round(skipped)
        self.losses, self.grad_norms, self.skips, self.terms, self.longest = [], [], [], [], self.in_a_row.clone()
        if longest >= self.max_skipped_steps:
            raise TrainingDivergedError(f"the loss or its gradient was not finite in {round(longest)} steps in a row "
                                        f"(train.max_skipped_steps), up to step {done}; lower optim.lr, set "
                                        "optim.max_grad_norm=1, or use train.precision=fp32")
        samples = done * self.global_batch_size
        metrics = {
            "samples_seen": samples, "epoch": samples / self.num_samples if self.num_samples else None, "loss": loss,
            "loss_minus_log_batch": loss - math.log(self.global_batch_size) if alone else None,
            **dict(zip(named, means, strict=True)), "lr": lr,
            "logit_scale": features.logit_scale.item() if features else None, "grad_norm": grad_norm,
            "skipped_steps": self.skipped,
            "peak_memory_gb": peak_memory_gb(self.device),
            **{name: dict(sum(map(Counter, gather_objects(counts)), Counter())) if world_size() > 1 else counts
               for name, counts in {"bad": bad, **(by_source or {})}.items()},
        }
        return {name: value for name, value in metrics.items() if value is not None}


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: of the GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
