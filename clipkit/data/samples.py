"""One sample: from the bytes of a shard to a picture, a caption and a group."""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clipkit.data.augment import augment
from clipkit.data.decode import DecodeError, decode_image
from clipkit.data.tars import BadSample, RawSample

if TYPE_CHECKING:
    from clipkit.config.data import AugmentConfig, DataConfig

PLACE = re.compile(r"\{(\w+)\}")  # where a template has the value of a json field


class Example(NamedTuple):
    """A training pair before tokenization."""

    image: Tensor  # (3, H, W) uint8, RGB
    caption: str
    group_id: int  # 63 bits; 0 where nothing is grouped
    teacher_ids: tuple[int, ...] = ()  # of picture and caption, 63 bits each; () without a teacher


class SampleError(ValueError):
    """Why a sample cannot be used: `cause` to count by, `detail` for a message."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail


class Examples(Protocol):
    """Makes an Example of a sample, in the loader's workers; picklable."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one Example's image."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of one Example's image."""
        ...

    @property
    def reads_npy(self) -> bool:
        """Whether it looks at .npy members."""
        ...

    def __call__(self, raw: RawSample, rng: random.Random) -> Example | BadSample:
        """Make it, with the sample's own source of chance."""
        ...


@dataclass(frozen=True, kw_only=True)
class PictureExamples:
    """Examples of pictures: decoded and augmented as the settings of the data say."""

    data: "DataConfig"
    image_size: int  # pixels a side
    group_by: str  # as in make_example
    for_teacher: bool = False  # name picture and caption, so that a teacher's features of them are found
    dtype = torch.uint8
    reads_npy = False

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.image_size, self.image_size

    def __call__(self, raw: RawSample, rng: random.Random) -> Example | BadSample:
        example = make_example(raw, image_size=self.image_size, config=self.data.augment, rng=rng,
                               max_pixels=self.data.max_pixels, fast_decode=self.data.decode == "fast",
                               caption_fields=self.data.caption_fields, caption_weights=self.data.caption_weights,
                               group_by=self.group_by, class_names=self.data.class_names)
        if not self.for_teacher or isinstance(example, BadSample):
            return example
        return example._replace(teacher_ids=(hash63(raw.image or b""), hash63(example.caption.encode())))


def make_example(raw: RawSample, *, image_size: int, config: "AugmentConfig", rng: random.Random, max_pixels: int,
                 fast_decode: bool = False, caption_fields: Sequence[str] | None = None,
                 caption_weights: Sequence[float] | None = None, group_by: str = "none",
                 class_names: Sequence[str] | None = None) -> Example | BadSample:
    """Decode and augment a sample's picture, choose one of its captions, and name its group.

    Args:
      raw: the sample as it stands in its shard.
      image_size: side of the picture, pixels.
      config: the augmentation.
      rng: the sample's own; the caption is drawn first, then the augmentation.
      max_pixels: a larger picture is a bad sample.
      fast_decode: decode JPEGs at reduced size where that suffices; inexact.
      caption_fields, caption_weights: as in choose_caption.
      group_by: "none", "caption", or a json field; equal values give equal group ids.
      class_names: as in read_fields.

    Returns:
      The Example, or a BadSample that says what is wrong.
    """
    try:
        if raw.image is None:
            raise SampleError("no image", "no .jpg, .png, .webp, ... member")
        fields = read_fields(raw, class_names)
        caption = choose_caption(raw.text, fields, caption_fields, caption_weights, rng)
        group = group_id(group_by, caption, fields)
        pixels = decode_image(raw.image, max_pixels=max_pixels, fast_size=2 * image_size if fast_decode else None)
        return Example(augment(pixels, image_size=image_size, config=config, rng=rng), caption, group)
    except (SampleError, DecodeError) as error:
        return BadSample(error.cause, raw.url, raw.key, error.detail)


def choose_caption(text: bytes | None, fields: dict[str, Any], caption_fields: Sequence[str] | None,
                   caption_weights: Sequence[float] | None, rng: random.Random) -> str:
    """Choose a sample's caption.

    Args:
      text: content of the .txt member.
      fields: the json member.
      caption_fields: json fields to draw from, "txt" = the .txt; only those that the sample has take part. A list
        gives each of its entries the same chance. A text with a field in braces is a template: "a photo of a {label}."
        None = the field `captions` where there is one, else the .txt.
      caption_weights: relative chance of each field. None = equal.
      rng: drawn from only where there is a choice.

    Raises:
      SampleError: there is no caption ("no caption"), or it is not Unicode ("bad text").
    """
    found = captions_by_field(text, fields, caption_fields)
    weights = [weight for weight, captions in zip(caption_weights or [1.0] * len(found), found, strict=True) if captions]
    found = [captions for captions in found if captions]
    if not found:
        places = "captions (json) and .txt" if caption_fields is None else ", ".join(caption_fields)
        raise SampleError("no caption", f"nothing in {places}")
    captions = found[0] if len(found) == 1 else rng.choices(found, weights)[0]
    return check_text(captions[0] if len(captions) == 1 else rng.choice(captions))


def captions_by_field(text: bytes | None, fields: dict[str, Any], caption_fields: Sequence[str] | None) -> list[list[str]]:
    """All captions that `choose_caption` may draw, of each entry of `caption_fields`; its arguments."""
    if caption_fields is None:
        return [_captions(fields.get("captions")) or _captions(_decode(text))]
    return [captions_of_field(name, text, fields) for name in caption_fields]


def check_text(caption: str) -> str:
    """Return a caption if it is one. A json may hold half a character (a lone surrogate), which no tokenizer or file takes.

    Raises:
      SampleError: it does ("bad text").
    """
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad text", f"a caption is not Unicode: {error}") from error
    return caption


def captions_of_field(name: str, text: bytes | None, fields: dict[str, Any]) -> list[str]:
    """The captions that one entry of `caption_fields` gives; arguments as in `choose_caption`."""
    place = PLACE.search(name)
    if place:
        return [name.replace(place[0], filling) for filling in captions_of_field(place[1], text, fields)]
    return _captions(_decode(text) if name == "txt" else fields.get(name))


def _captions(value: Any) -> list[str]:
    """The texts of a json value that are not blank."""
    texts = value if isinstance(value, list) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _decode(text: bytes | None) -> str | None:
    try:
        return None if text is None else text.decode("utf-8-sig")  # -sig: Windows editors write a byte-order mark
    except UnicodeDecodeError as error:
        raise SampleError("bad text", f"the .txt is not UTF-8: {error}") from error


def read_fields(raw: RawSample, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Read a sample's json, with the name of its class number as the field `label`, where names are given.

    Raises:
      SampleError: the json is no object ("bad json"), the number is no class ("unknown class"), or the sample has a class
        number, nothing else that a caption could be made of, and the classes have no names ("label without a name").
    """
    fields = parse_json(raw.json)
    if raw.label is None:
        return fields
    if class_names is None:
        if raw.text is None and not fields:
            raise SampleError("label without a name", "it has a class number (.cls) and no caption; give data.class_names, the "
                                                      "names in the order of the numbers or a .txt file with them")
        return fields
    try:
        number = int(raw.label)
        if number < 0:
            raise IndexError(number)
        return {**fields, "label": class_names[number]}
    except (ValueError, IndexError) as error:
        raise SampleError("unknown class", f"the .cls is {raw.label[:20]!r}; data.class_names has {len(class_names)} names, of "
                                           f"the numbers 0 to {len(class_names) - 1}") from error


def parse_json(data: bytes | None) -> dict[str, Any]:
    """Read a sample's json member; {} without one. Raises SampleError ("bad json") where it is no object."""
    if data is None:
        return {}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad json", str(error)) from error
    if not isinstance(fields, dict):
        raise SampleError("bad json", f"a {type(fields).__name__}, not an object")
    return fields


def group_id(group_by: str, caption: str, fields: dict[str, Any]) -> int:
    if group_by == "none":
        return 0
    if group_by != "caption" and fields.get(group_by) is None:
        raise SampleError("no group", f"no json field {group_by!r}, by which samples are grouped")
    value = caption if group_by == "caption" else str(fields[group_by])
    return hash63(value.encode("utf-8", "surrogatepass"))


def hash63(content: bytes) -> int:
    """Name bytes by a number of 63 bits: not negative as int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1
