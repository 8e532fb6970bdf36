"""Distillation: the student's softmaxes over the batch are drawn to a teacher's."""

import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.clip import check_shapes
from clipkit.losses.gather import gather, gather_with_grad


def distill_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, teacher_image_features: Tensor,
                 teacher_text_features: Tensor, teacher_logit_scale: float) -> Tensor:
    """Kullback-Leibler divergence of the student's softmaxes from a teacher's, image to text and text to image.

    Each process holds its own rows, as in `clip_loss`: means over processes, of losses and of gradients, are those of the
    global batch. Pairs of one group stay in: how alike they are is what the teacher says. The (B, G) logits are held whole.

    Args:
      image_features: (B, D), unit norm. Row i matches text row i.
      text_features: (B, D), unit norm.
      logit_scale: Scalar > 0, the student's 1/temperature (not its logarithm).
      teacher_image_features: (B, T), unit norm, of the same pairs; T may differ from D.
      teacher_text_features: (B, T), unit norm.
      teacher_logit_scale: The teacher's own 1/temperature.

    Returns:
      Scalar, nats, at least 0: mean over the B pairs of this process and both directions, each softmax over all G.

    Raises:
      ValueError: the feature shapes differ.

    Source: the distillation term of Vasu et al. 2024, section 3 (arXiv:2311.17049), with one teacher; it is the affinity
    mimicking of Wu et al. 2023 (arXiv:2309.12314) but for the teacher's entropy, a constant.
    """
    check_shapes(image_features, text_features)
    check_shapes(teacher_image_features, teacher_text_features)
    image_to_text, text_to_image = (
        F.kl_div(F.log_softmax(logit_scale * own @ gather_with_grad(other).T, dim=1),  # (B, G)
                 F.log_softmax(teacher_logit_scale * teacher_own @ gather(teacher_other).T, dim=1),  # (B, G)
                 reduction="batchmean", log_target=True)
        for own, other, teacher_own, teacher_other in (
            (image_features, text_features, teacher_image_features, teacher_text_features),
            (text_features, image_features, teacher_text_features, teacher_image_features)))
    return (image_to_text + text_to_image) / 2
