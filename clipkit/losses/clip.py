"""The contrastive loss of CLIP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.gather import gather, gather_with_grad, rank


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None, *,
              group_ids: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy between matched image-text pairs (InfoNCE) over the batch of all processes.

    Each process holds its own rows of the logits. The mean of the processes' losses is the loss of the global batch, and
    the mean of their gradients (as DDP takes it) is its gradient, the temperature's too.

    Args:
      image_features: (B, D), unit norm. Row i matches text row i.
      text_features: (B, D), unit norm.
      logit_scale: Scalar > 0, 1/temperature (not its logarithm).
      logit_bias: Ignored: a constant cancels in the softmax.
      group_ids: (B,) integers; pairs of equal id are no negatives of each other and leave both softmaxes.

    Returns:
      Scalar, nats: mean over the B pairs of this process and both directions. Negatives: all G pairs.

    Raises:
      ValueError: the feature shapes differ.

    Source: Radford et al. 2021, figure 3 (arXiv:2103.00020).
    """
    check_shapes(image_features, text_features)
    all_image_features = gather_with_grad(image_features)  # (G, D)
    all_text_features = gather_with_grad(text_features)  # (G, D)
    labels = own_columns(image_features)  # (B,)
    logits_per_image = logit_scale * image_features @ all_text_features.T  # (B, G)
    logits_per_text = logit_scale * text_features @ all_image_features.T  # (B, G)
    if group_ids is not None:
        same = same_group(group_ids, labels)  # (B, G)
        logits_per_image = logits_per_image.masked_fill(same, -torch.inf)
        logits_per_text = logits_per_text.masked_fill(same, -torch.inf)
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def own_columns(rows: Tensor) -> Tensor:
    """The places of this process's rows among those of all processes. (B, ...) -> (B,) int64."""
    return len(rows) * rank() + torch.arange(len(rows), device=rows.device)


def same_group(group_ids: Tensor, labels: Tensor) -> Tensor:
    """True where a column is another pair of the row's own group. (B,), (B,) -> (B, G) bool; the pair itself is False."""
    same = group_ids[:, None] == gather(group_ids)[None, :]  # (B, G)
    same[torch.arange(len(labels), device=labels.device), labels] = False
    return same


@torch.no_grad()
def in_batch_accuracy(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Share of rows whose own partner is the nearest in the global batch: of images among texts, of texts among images.

    Args:
      image_features: (B, D), unit norm. Row i matches text row i.
      text_features: (B, D), unit norm.

    Returns:
      Two scalars in [0, 1], means over the B rows of this process.
    """
    labels = own_columns(image_features)  # (B,)
    image_to_text = (image_features @ gather(text_features).T).argmax(dim=1) == labels  # (B,)
    text_to_image = (text_features @ gather(image_features).T).argmax(dim=1) == labels  # (B,)
    return image_to_text.float().mean(), text_to_image.float().mean()


def check_shapes(image_features: Tensor, text_features: Tensor) -> None:
    """Raise ValueError unless there is one row per pair on both sides."""
    if image_features.shape != text_features.shape:
        raise ValueError(f"image_features {tuple(image_features.shape)} and text_features "
                         f"{tuple(text_features.shape)} must have one shape: one row per pair")
