"""The objectives, as functions of features and scale; they never see a model."""

from clipkit.losses.clip import clip_loss, in_batch_accuracy
from clipkit.losses.siglip import siglip_loss

LOSSES = {"clip": clip_loss, "siglip": siglip_loss}

__all__ = ["LOSSES", "clip_loss", "in_batch_accuracy", "siglip_loss"]
