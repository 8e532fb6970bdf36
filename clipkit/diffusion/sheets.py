"""Sheets of samples that show how a training goes: from texts, or each beside the picture that it was made from."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clipkit.data.remote import remote_shards
from clipkit.data.samples import Example, PictureExamples
from clipkit.data.tars import RawSample, read_shard
from clipkit.diffusion.autoencoder import to_pixel_values
from clipkit.diffusion.conditioning import Conditioning, TextConditioning
from clipkit.diffusion.generate import Sampling, generate
from clipkit.diffusion.pipeline_folder import Pipeline
from clipkit.evaluation.contact_sheet import draw_contact_sheet
from clipkit.evaluation.predictions import Prediction

if TYPE_CHECKING:
    from clipkit.config.data import DataConfig


class SheetConditions(NamedTuple):
    """What the samples of a sheet are made from. Legend: N samples."""

    condition: Tensor  # (N, L, D) or (N, M, h, w), on the device
    captions: list[str]
    given: Tensor | None  # (N, 3, s, s) in [0, 1]: the pictures that they are made from; None for texts


def sheet_conditions(conditioning: Conditioning, shards: Sequence[str], *, data: "DataConfig", image_size: int,
                     num_samples: int, prompts: Sequence[str] | None = None) -> SheetConditions:
    """Find what to make samples from: the prompts, repeated as often as needed, else the first samples of the shards.

    Args:
      conditioning: on its device.
      shards: of training pictures.
      data: how they are read.
      image_size: pixels a side.
      num_samples: on the sheet; fewer where the shards have fewer.
      prompts: texts, for text conditioning alone.
    """
    if prompts:
        captions = [prompts[number % len(prompts)] for number in range(num_samples)]
        assert isinstance(conditioning, TextConditioning)
        return SheetConditions(conditioning.from_texts(captions), captions, None)
    examples = list(islice(still_examples(shards, data=data, image_size=image_size), num_samples))
    captions = [example.caption for example in examples]
    if isinstance(conditioning, TextConditioning):
        return SheetConditions(conditioning.from_texts(captions), captions, None)
    images = to_pixel_values(torch.stack([example.image for example in examples])).to(conditioning.empty.device)
    given = images if conditioning.kind == "image" else conditioning.condition_of(images)  # pyright: ignore
    return SheetConditions(conditioning(None, images), captions, given / 2 + 0.5)


def still_examples(shards: Sequence[str], *, data: "DataConfig", image_size: int) -> Iterator[Example]:
    """The good samples of shards in their order, pictures not flipped."""
    still = replace(data, augment=replace(data.augment, flip=0.0))
    make = PictureExamples(data=still, image_size=image_size, group_by="none")
    remote = remote_shards(data)
    for raw in chain.from_iterable(read_shard(shard, allow_pipe=data.allow_pipe, remote=remote) for shard in shards):
        example = make(raw, random.Random(0)) if isinstance(raw, RawSample) else raw
        if isinstance(example, Example):
            yield example


def draw_samples(pipeline: Pipeline, conditions: SheetConditions, how: Sampling, *, batch_size: int, path: Path,
                 title: str) -> None:
    """Make one sample of each condition (seeds 0, 1, ...) and draw them with their captions as a PNG.

    Args:
      pipeline: what makes them.
      conditions: what they are made from.
      how: the walk.
      batch_size: samples at once.
      path: of the PNG; its folder is made.
      title: a line above them.
    """
    made = []
    for start in range(0, len(conditions.captions), batch_size):
        rows = conditions.condition[start:start + batch_size]
        made.append(generate(pipeline, rows, range(start, start + len(rows)), how).cpu())
    pictures = to_pictures(torch.cat(made))
    if conditions.given is not None:
        pictures = [beside(one, other) for one, other in zip(to_pictures(conditions.given.cpu()), pictures, strict=True)]
    captioned = zip(pictures, conditions.captions, strict=True)
    draw_contact_sheet([Prediction(picture, "", ((caption, False),)) for picture, caption in captioned], path, title=title)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (N, 3, H, W) in [0, 1] as 8-bit pictures, rounded as diffusers does."""
    values = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    return [Image.fromarray(one) for one in values]


def beside(given: Image.Image, made: Image.Image) -> Image.Image:
    """Two pictures side by side, the given one brought to the size of the other pixel for pixel."""
    both = Image.new("RGB", (2 * made.width, made.height))
    both.paste(given.resize(made.size, Image.Resampling.NEAREST), (0, 0))
    both.paste(made, (made.width, 0))
    return both
