"""What samples are made from, dealt in turn: sample i has source i mod their number. Each source is encoded once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data.decode import DecodeError, crop_and_resize, decode_image
from clipkit.diffusion.autoencoder import to_pixel_values
from clipkit.diffusion.conditioning import TextConditioning
from clipkit.diffusion.pipeline_folder import Pipeline
from clipkit.diffusion.sheets import to_pictures
from clipkit.evaluation.image_sets import MAX_PIXELS, pictures_in
from clipkit.evaluation.sample_keys import printable
from clipkit.model.build import file_sha256

SOURCES_AT_ONCE = 16  # encoded together whatever the batch of samples is, so that it changes no bit
MAX_KEPT = 1024  # conditions held in memory


class Sources(NamedTuple):
    """Prompts or given pictures, not encoded yet."""

    facts: list[dict[str, str]]  # what a sample's file says of it: {"prompt": text}, or {"image": name, "image_sha256": hash}
    files: list[Path]  # of the pictures; [] for prompts

    def number_of(self, sample: int) -> int:
        return sample % len(self.facts)

    def title_of(self, sample: int) -> str:
        """The prompt of a sample, or the name of its picture."""
        return next(iter(self.facts[self.number_of(sample)].values()))


def prompt_sources(prompts: Sequence[str]) -> Sources:
    """Samples from texts."""
    return Sources([{"prompt": prompt} for prompt in prompts], [])


def picture_sources(images: str) -> Sources:
    """Samples from a folder of pictures, or from one.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: no file has the suffix of a picture.
    """
    found = [(printable(picture.key), Path(str(picture.record.image))) for picture in pictures_in(images).pictures]
    return Sources([{"image": key, "image_sha256": file_sha256(file)} for key, file in found], [file for _, file in found])


class Conditions:
    """The sources of samples, encoded when they are wanted."""

    def __init__(self, pipeline: Pipeline, sources: Sources) -> None:
        self.pipeline, self.sources = pipeline, sources
        self._kept: dict[int, Tensor] = {}  # number of a block of sources -> its conditions

    def __call__(self, samples: Sequence[int]) -> Tensor:
        """The conditions of some samples: (B, L, D) or (B, M, h, w).

        Raises:
          ValueError: a file is no picture that can be used.
        """
        places = [divmod(self.sources.number_of(sample), SOURCES_AT_ONCE) for sample in samples]
        wanted: dict[int, Tensor] = {}
        for block in dict.fromkeys(block for block, _ in places):
            wanted[block] = self._kept.pop(block) if block in self._kept else self._encode(block)
        self._kept |= wanted  # the latest stand last
        for block in list(self._kept)[:-(MAX_KEPT // SOURCES_AT_ONCE)]:
            del self._kept[block]
        return torch.stack([wanted[block][row] for block, row in places])

    def picture(self, sample: int) -> Image.Image | None:
        """What is given of a sample's picture, at the size that the model sees; None for texts."""
        number = self.sources.number_of(sample)
        return to_pictures(self._given(number) / 2 + 0.5)[0] if self.sources.files else None

    def _encode(self, block: int) -> Tensor:
        conditioning: Any = self.pipeline.conditioning
        first = block * SOURCES_AT_ONCE
        numbers = range(first, min(first + SOURCES_AT_ONCE, len(self.sources.facts)))
        if isinstance(conditioning, TextConditioning):
            return conditioning.from_texts([self.sources.facts[number]["prompt"] for number in numbers])
        images = torch.cat([self._given(number) for number in numbers]).to(conditioning.empty.device)
        return conditioning(None, images) if conditioning.kind == "image" else conditioning.from_condition(images)

    def _given(self, number: int) -> Tensor:
        """A picture's middle square (1, 3, H, W) in [-1, 1], of the size that training had."""
        conditioning: Any = self.pipeline.conditioning
        square = middle_square(_read(self.sources.facts[number]["image"], self.sources.files[number]))
        if conditioning.kind == "image":
            return to_pixel_values(crop_and_resize(square, (0, 0, *square.shape[:2]), self.pipeline.image_size)[None])
        return conditioning.condition_of(to_pixel_values(torch.from_numpy(square).permute(2, 0, 1)[None]))


def cut_note(pipeline: Pipeline, sources: Sources) -> str:
    """Say how many prompts the text encoder takes only the beginning of; "" where it takes all."""
    if not isinstance(pipeline.conditioning, TextConditioning):
        return ""
    tokenize = pipeline.conditioning.tokenize
    num_cut = tokenize.count_cut([facts["prompt"] for facts in sources.facts])
    return (f"note      {num_cut:,} of {len(sources.facts):,} prompts are longer than the {tokenize.context_length} tokens "
            "that the text encoder takes; the rest of each is cut off") if num_cut else ""


def middle_square(image: np.ndarray) -> np.ndarray:
    """The largest square around the middle of a picture (H, W, 3): (S, S, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top:top + side, left:left + side]


def _read(key: str, file: Path) -> np.ndarray:
    try:
        return decode_image(file.read_bytes(), max_pixels=MAX_PIXELS)
    except DecodeError as error:
        raise ValueError(f"images has {key}, which cannot be used ({error.cause}: {error.detail}); take it away or replace it"
                         ) from error
