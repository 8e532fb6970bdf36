"""ImageTextModel: two towers, two projections and a temperature. It knows nothing of losses."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.model.trim import can_trim, encode_trimmed

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipkit.data.tokenize import Tokenizer


class Features(NamedTuple):
    """What a loss needs of one batch. Legend: B batch (this process), D embed_dim."""

    image_features: Tensor  # (B, D) unit norm, fp32
    text_features: Tensor  # (B, D) unit norm, fp32
    logit_scale: Tensor  # scalar > 0, 1/temperature
    logit_bias: Tensor | None = None  # scalar, SigLIP's


class ImageTextModel(nn.Module):
    """An open_clip model (its state-dict keys are kept) with its tokenizer and its preprocessing.

    Attributes:
      towers: The open_clip module; `towers.state_dict()` is what is saved.
      config: {"model_cfg": ..., "preprocess_cfg": ...} as in open_clip_config.json.
      image_size: Pixels a side.
      source_sha256: Hash of the weights file that was loaded; None for fresh weights.
    """

    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    def __init__(self, towers: nn.Module, config: dict[str, Any], tokenize: "Tokenizer") -> None:
        super().__init__()
        self.towers: Any = towers
        self.config = config
        self.tokenize = tokenize
        self.source_sha256: str | None = None
        preprocess_cfg = config["preprocess_cfg"]
        size = preprocess_cfg["size"]
        self.image_size: int = size if isinstance(size, int) else size[-1]
        for name in ("mean", "std"):
            values = torch.tensor(preprocess_cfg[name])[:, None, None]
            self.register_buffer(name, values, persistent=False)
        self._preprocess: Any = None
        self.trims_text = can_trim(towers)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a model that learns on is no longer what its file holds. A locked text encoder drops nothing out."""
        super().train(mode)
        if mode:
            self.source_sha256 = None
            encoder = getattr(getattr(self.towers, "text", None), "transformer", None)  # of Hugging Face, with dropout
            if encoder is not None and not any(weight.requires_grad for weight in encoder.parameters()):
                encoder.eval()
        return self

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        """Embed pairs: images (B, 3, H, W), uint8 or preprocessed; tokens (B, L)."""
        return Features(self.encode_image(images), self.encode_text(tokens), self.towers.logit_scale.exp(),
                        self.towers.logit_bias)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W): uint8 ones are normalised here, floats are taken as preprocessed. (B, D) unit norm."""
        if images.dtype == torch.uint8:
            images = (images.float().div(255) - self.mean) / self.std  # (B, 3, H, W)
        return F.normalize(self.towers.encode_image(images).float(), dim=-1)

    def encode_image_with_trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images once, to the features that `encode_image` gives and to those before the projection.

        Args:
          images: (B, 3, H, W), as in `encode_image`.

        Returns:
          (B, D) unit norm, bit-equal to `encode_image`; and (B, F) fp32 as the trunk gives them, not normalised.

        Raises:
          ValueError: the image tower has no projection of its own (see `has_trunk_features`).
        """
        projection = _image_projection(self.towers.visual)
        if projection is None:
            kind = type(self.towers.visual).__name__
            raise ValueError(f"the image tower ({kind}) has no separate projection, so no features before it; use its "
                             "projected features, or a model with a ViT or a timm tower with a linear or mlp projection")
        if images.dtype == torch.uint8:
            images = (images.float().div(255) - self.mean) / self.std  # (B, 3, H, W)
        if isinstance(projection, Tensor):
            trunk = type(self.towers.visual).forward(_Unprojected(self.towers.visual), images)  # (B, F)
            return F.normalize((trunk @ projection).float(), dim=-1), trunk.float()
        seen: list[Tensor] = []
        with projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])):
            features = self.towers.encode_image(images)  # (B, D)
        return F.normalize(features.float(), dim=-1), seen[0].float()

    @property
    def has_trunk_features(self) -> bool:
        """Whether `encode_image_with_trunk` can be used; a ResNet's attention pool, for one, projects as it pools."""
        return _image_projection(self.towers.visual) is not None

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed token ids (B, L). (B, D) unit norm."""
        trimmed = self.trims_text and tokens.device.type == "cpu"
        features = encode_trimmed(self.towers, tokens) if trimmed else self.towers.encode_text(tokens)
        return F.normalize(features.float(), dim=-1)

    def preprocess(self, image: "Image") -> Tensor:
        """Resize, crop and normalise a picture exactly as open_clip evaluates it. (3, H, W) float."""
        return self.transform(image)

    @property
    def transform(self) -> "Callable[[Image], Tensor]":
        """What `preprocess` applies. It holds no weights, so loader processes can have it."""
        if self._preprocess is None:
            from open_clip.transform import PreprocessCfg, image_transform_v2

            self._preprocess = image_transform_v2(PreprocessCfg(**self.config["preprocess_cfg"]), is_train=False)
        return self._preprocess

    @torch.no_grad()
    def clamp_logit_scale(self, maximum: float = 4.6052) -> None:  # ln(100), Radford et al. 2021, section 2.5
        """Hold the temperature's logarithm in [0, ln 100]."""
        self.towers.logit_scale.clamp_(0, maximum)

    @property
    def device(self) -> torch.device:
        return self.towers.logit_scale.device


def compile_towers(model: ImageTextModel) -> None:
    """Let torch compile both towers, in place. What trims the text stays outside: it reads lengths on the host."""
    model.towers.visual.compile()
    text = model.towers.transformer if hasattr(model.towers, "transformer") else model.towers.text
    text.compile()  # the second length that it meets makes it compile once more, for any length


def has_batch_statistics(model: nn.Module) -> bool:
    """True if a module that learns normalises by the statistics of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in module.parameters())
               for module in model.modules())


def parameter_counts(model: ImageTextModel) -> dict[str, int]:
    """Count parameters of the image tower, the text side, and those that learn."""
    image = sum(p.numel() for p in model.towers.visual.parameters())
    total = sum(p.numel() for p in model.towers.parameters())
    return {"image": image, "text": total - image,
            "learning": sum(p.numel() for p in model.towers.parameters() if p.requires_grad)}


def stack_images(model: ImageTextModel, images: Sequence["Image"]) -> Tensor:
    """Preprocess pictures into one tensor (N, 3, H, W) on the model's device."""
    return torch.stack([model.preprocess(image) for image in images]).to(model.device)


class _Unprojected:
    """Stands in for an open_clip ViT inside its own forward: it has no projection, all else is the tower's."""

    proj = None
    output_tokens = False

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    def __getattr__(self, name: str) -> Any:
        return getattr(self.visual, name)


def _image_projection(visual: Any) -> Tensor | nn.Module | None:
    """The last step of an image tower: a ViT's matrix (F, D), a timm tower's module, or None where it has none of its own."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer):
        return visual.proj
    if not isinstance(visual, TimmModel):
        return None
    head, trunk = cast(Any, visual.head), cast(Any, visual.trunk)
    if len(head):
        return getattr(head, "proj", getattr(head, "mlp", None))
    classifier = trunk.get_classifier()  # open_clip lets timm's own classifier project where no other is asked for
    return classifier if isinstance(classifier, nn.Linear) else None
