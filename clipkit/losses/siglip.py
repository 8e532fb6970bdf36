"""The pairwise sigmoid loss of SigLIP."""

import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.clip import check_shapes, own_columns, same_group
from clipkit.losses.gather import gather_with_grad


def siglip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None, *,
                group_ids: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every image against every text of the batch of all processes.

    Each process holds the rows of its images. Means over processes, of losses and of gradients, are those of the global
    batch.

    Args:
      image_features: (B, D), unit norm. Row i matches text row i.
      text_features: (B, D), unit norm.
      logit_scale: Scalar > 0, 1/temperature (not its logarithm).
      logit_bias: Scalar added to every logit; None = 0.
      group_ids: (B,) integers; pairs of equal id are no negatives of each other and leave the sum.

    Returns:
      Scalar, nats: sum over all G texts, mean over the B images of this process.

    Raises:
      ValueError: the feature shapes differ.

    Source: Zhai et al. 2023, algorithm 1 (arXiv:2303.15343).
    """
    check_shapes(image_features, text_features)
    labels = own_columns(image_features)  # (B,)
    logits = logit_scale * image_features @ gather_with_grad(text_features).T  # (B, G)
    if logit_bias is not None:
        logits = logits + logit_bias
    matched = F.one_hot(labels, logits.shape[1])  # (B, G), 1 on the pairs, else 0
    losses = -F.logsigmoid((2 * matched - 1) * logits)  # (B, G)
    if group_ids is not None:
        losses = losses.masked_fill(same_group(group_ids, labels), 0)
    return losses.sum() / len(image_features)
