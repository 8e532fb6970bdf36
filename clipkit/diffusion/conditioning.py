"""What pictures are made from: a text, a picture's embedding, a small picture, a map of colours. One tensor a picture.

A text or an embedding is a context (B, L, D) that the U-Net attends to; a small picture or a map is a map (B, M, h, w) that
stands beside the latent.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.diffusion.quiet import quiet_loading
from clipkit.interop.provenance import run_of
from clipkit.interop.self_check import clean
from clipkit.interop.whole_folder import PROVENANCE
from clipkit.model.build import file_sha256
from clipkit.model.folder import WEIGHTS_NAME, load_model, save_model_folder

if TYPE_CHECKING:
    from clipkit.config.diffusion.train import ConditioningConfig

NUM_COLOURS = 8  # the corners of the RGB cube


class TextTokenizer:
    """Texts to (N, L) int32 with a text-encoder folder's own tokenizer, after the cleaning that its README names. Picklable."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.context_length: int = tokenizer.model_max_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(clean(texts), padding="max_length", truncation=True, max_length=self.context_length,
                              return_tensors="pt").input_ids.int()  # (N, L)

    def count_cut(self, texts: Sequence[str]) -> int:
        """Count the texts with more tokens than the context holds; the rest of each is cut off."""
        return sum(len(ids) > self.context_length for ids in self.tokenizer(clean(texts)).input_ids) if texts else 0


class TextConditioning(nn.Module):
    """The last hidden states of a transformers text encoder, as every Stable Diffusion pipeline reads them."""

    kind = "text"
    empty: Tensor  # (L, D)

    def __init__(self, text_encoder: nn.Module, tokenizer: Any, *, weights_sha256: str | None = None) -> None:
        super().__init__()
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenize = TextTokenizer(tokenizer)
        self.width: int = text_encoder.config.hidden_size  # pyright: ignore
        self.weights_sha256 = weights_sha256  # of the CLIP that the encoder was exported from, where that is known
        self.register_buffer("empty", self.from_texts([""])[0], persistent=False)

    @torch.no_grad()
    def forward(self, tokens: Tensor, images: Tensor | None = None) -> Tensor:
        """Token ids (B, L) to a context (B, L, D); pictures are not looked at."""
        return self.text_encoder(tokens.to(self.text_encoder.device)).last_hidden_state  # pyright: ignore

    def from_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to a context (N, L, D)."""
        return self(self.tokenize(texts))

    def save(self, folder: Path) -> None:
        """Write text_encoder/ and tokenizer/, as a pipeline has them."""
        self.text_encoder.save_pretrained(folder / "text_encoder")  # pyright: ignore
        self.tokenize.tokenizer.save_pretrained(folder / "tokenizer")


class ImageConditioning(nn.Module):
    """The embedding of a picture by a CLIP, as a context of one token: variations of a picture."""

    kind = "image"
    empty: Tensor  # (1, D)
    mean: Tensor  # (3, 1, 1)
    std: Tensor

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.width: int = clip.config["model_cfg"]["embed_dim"]
        self.weights_sha256 = clip.source_sha256
        mean, std = (torch.tensor(clip.config["preprocess_cfg"][name])[:, None, None] for name in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.register_buffer("empty", torch.zeros(1, self.width), persistent=False)

    @torch.no_grad()
    def forward(self, tokens: Tensor | None, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to a context (B, 1, D) of variance 1; token ids are not looked at."""
        size = self.clip.image_size
        small = F.interpolate((images + 1) / 2, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        features = self.clip.encode_image((small - self.mean) / self.std)  # (B, D), unit norm
        return features[:, None] * self.width**0.5

    def save(self, folder: Path) -> None:
        """Write image_encoder/, a model folder."""
        save_model_folder(self.clip, folder / "image_encoder")


class MapConditioning(nn.Module):
    """A map that stands beside the latent, told from the picture itself: a small copy, or its colours.

    Args:
      kind: "low_resolution" or "semantic_map".
      side: cells a side of the latent (pixels where there is no autoencoder).
      small: for low_resolution, pixels a side of the small picture.
    """

    weights_sha256 = None
    empty: Tensor  # (M, h, w)

    def __init__(self, kind: str, *, side: int, small: int = 0) -> None:
        super().__init__()
        self.kind, self.side, self.small = kind, side, small
        if kind == "low_resolution" and max(small, side) % min(small, side):
            raise ValueError(f"the small picture has {small} pixels a side and the latent {side} cells, and neither is a "
                             "multiple of the other; choose another conditioning.factor")
        self.width = NUM_COLOURS if kind == "semantic_map" else 3 * max(1, small // side) ** 2
        self.register_buffer("empty", torch.zeros(self.width, side, side), persistent=False)

    @torch.no_grad()
    def forward(self, tokens: Tensor | None, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to maps (B, M, h, w)."""
        return self.from_condition(self.condition_of(images))

    def condition_of(self, images: Tensor) -> Tensor:
        """What a person would give: small pictures (B, 3, s, s), or pictures of flat colours (B, 3, h, w), in [-1, 1]."""
        side = self.small if self.kind == "low_resolution" else self.side
        small = F.interpolate(images, size=(side, side), mode="area")
        return small if self.kind == "low_resolution" else small.ge(0).to(images.dtype) * 2 - 1

    def from_condition(self, given: Tensor) -> Tensor:
        """The map (B, M, h, w) of what `condition_of` gives."""
        if self.kind == "semantic_map":
            bits = given.ge(0).long()  # (B, 3, h, w)
            index = bits[:, 0] * 4 + bits[:, 1] * 2 + bits[:, 2]  # (B, h, w)
            return F.one_hot(index, NUM_COLOURS).permute(0, 3, 1, 2).to(given.dtype)
        if self.small >= self.side:
            return F.pixel_unshuffle(given, self.small // self.side)  # each cell has its pixels as channels: nothing is lost
        return F.interpolate(given, size=(self.side, self.side), mode="bilinear", antialias=False)

    def save(self, folder: Path) -> None:
        """Nothing to write: it has no weights."""


Conditioning = TextConditioning | ImageConditioning | MapConditioning


def make_conditioning(config: "ConditioningConfig", *, image_size: int, side: int) -> Conditioning:
    """Build what the U-Net is told.

    Args:
      config: kind, source and factor are read.
      image_size: pixels a side of the pictures.
      side: cells a side of the latent.

    Raises:
      FileNotFoundError: the source has no such encoder.
      ValueError: the encoder does not fit its tokenizer, the run it is said to be from, or the sizes.
    """
    if config.kind == "text":
        assert config.source
        return load_text_conditioning(config.source)
    if config.kind == "image":
        assert config.source
        return ImageConditioning(load_model(config.source))
    if config.kind == "low_resolution" and image_size % config.factor:
        raise ValueError(f"conditioning.factor is {config.factor}, which does not divide model.image_size={image_size}")
    return MapConditioning(config.kind, side=side, small=image_size // config.factor)


def mix_conditions(condition: Tensor, empty: Tensor, dropped: Tensor) -> Tensor:
    """Put the empty condition in the place of dropped rows.

    Args:
      condition: (B, L, D) or (B, M, h, w).
      empty: of one row.
      dropped: (B,) bool.
    """
    return torch.where(dropped.view(-1, *(1,) * empty.ndim), empty, condition)


def load_text_conditioning(source: str) -> TextConditioning:
    """Load the text encoder that conditions.

    Args:
      source: a run, whose export/text_encoder is taken and has to be of the run's present weights; a text-encoder folder; or a
        pipeline folder (text_encoder/ and tokenizer/).

    Raises:
      FileNotFoundError: there is no text encoder.
      ValueError: it does not fit its tokenizer, or was exported from other weights than the run's.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    run = run_of(source)
    folder = run / "export" / "text_encoder" if run else Path(source)
    encoder = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    if not (encoder / "config.json").is_file():
        advice = f"clipkit export model={source}" if run else "clipkit export model=<run> out=<folder>"
        raise FileNotFoundError(f"{encoder} holds no text encoder; write it with: {advice}")
    exported = _exported_from(encoder)
    if run:
        _check_same_weights(run, folder, exported)
    with quiet_loading():
        text_encoder: Any = CLIPTextModel.from_pretrained(encoder, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer" if encoder != folder else folder, local_files_only=True)
    _check_tokenizer(encoder, text_encoder.config, tokenizer)
    return TextConditioning(text_encoder, tokenizer, weights_sha256=exported)


def _exported_from(folder: Path) -> str | None:
    """Hash of the weights that an export was made from; None for a folder of another origin."""
    if not (folder / PROVENANCE).is_file():
        return None
    return json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["source"]["weights_sha256"]


def _check_same_weights(run: Path, folder: Path, exported: str | None) -> None:
    weights = run / "model" / WEIGHTS_NAME
    if weights.is_file() and exported != file_sha256(weights):
        raise ValueError(f"{folder} was exported from other weights than {run} has (sha256 {(exported or 'unknown')[:12]}); "
                         f"renew it with: clipkit export model={run} overwrite=true")


def _check_tokenizer(folder: Path, config: Any, tokenizer: Any) -> None:
    """Raise ValueError unless the tokenizer is the one that the encoder was trained with, as far as their files tell."""
    mismatches = [f"{name} {theirs} in the tokenizer, {ours} in config.json" for name, theirs, ours in (
        ("vocabulary", len(tokenizer), config.vocab_size), ("context length", tokenizer.model_max_length,
                                                            config.max_position_embeddings),
        ("end-of-text token", tokenizer.eos_token_id, config.eos_token_id)) if theirs != ours]
    if mismatches:
        raise ValueError(f"{folder} has a tokenizer that does not fit its encoder: {'; '.join(mismatches)}; write the folder "
                         "anew with clipkit export")

