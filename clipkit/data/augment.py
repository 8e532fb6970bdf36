"""Random changes to a training picture: crop, flip, affine and colour, every parameter drawn from the sample's own rng.

Each is off at its neutral setting; with all of them off the result is the resized crop alone.
"""

import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from clipkit.config.data import AugmentConfig
from clipkit.data.decode import crop_and_resize

IDENTITY = np.eye(3)
LEVELS = np.arange(256) / 255
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the grey of torchvision and Pillow
RGB_TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])  # NTSC
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)
WHITE = (255, 255, 255)
# The warp reads small pictures at up to twice the final size, so that it does not blur them. Above this side, pixels,
# the resize to that size would cost more than the decoder, and they are read at the final size.
WARP_MAX_OVERSAMPLED = 128
WARP_CELLS = 2  # a side
NEARLY_WHITE = 248  # below it in any channel a pixel belongs to the drawing
DISC_MIN_SHARE = 2 / 3  # so that a long thin drawing keeps more than its middle; flags are 2:3 or wider
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


def augment(image: np.ndarray, *, image_size: int, config: AugmentConfig, rng: random.Random) -> Tensor:
    """Turn a decoded picture into a training input.

    Args:
      image: (H, W, 3) uint8.
      image_size: side of the result, pixels.
      config: which changes, and how strong.
      rng: the only source of randomness.

    Returns:
      (3, image_size, image_size) uint8, channels last in memory; nothing of `image` is shared.
    """
    if config.disc and rng.random() < config.disc:
        image = cut_disc(image)
    box = random_crop_box(image.shape[0], image.shape[1], config.crop_scale, config.crop_ratio, rng)
    flip = rng.random() < config.flip
    work_size = max(image_size, min(2 * image_size, WARP_MAX_OVERSAMPLED, *box[2:]))
    affine = random_affine(work_size, image_size, config, rng)
    mesh = random_warp(image_size, work_size, affine, config, rng)
    tone = random_tone(config, rng)
    colour_steps = random_colour(config, rng)
    blur = rng.uniform(-config.sharpness, config.sharpness) if config.sharpness else 0.0
    if tone is not None:
        image = np.take(tone, image)
    pixels = crop_and_resize(image, box, work_size if affine or mesh else image_size)  # (3, S, S)
    if affine or mesh or colour_steps or blur:
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # Pillow is 2 to 3 times faster here than torch
        if affine or mesh:
            kind, data = (Image.Transform.MESH, mesh) if mesh else (Image.Transform.AFFINE, affine)
            picture = picture.transform((image_size, image_size), kind, data, Image.Resampling.BILINEAR, fillcolor=WHITE)
        if colour_steps:
            picture = recolour(picture, colour_steps, config.keep_white)
        if blur:
            picture = Image.blend(picture, picture.filter(ImageFilter.BoxBlur(1)), blur)  # below 0: sharper
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image_size, image_size, 3).permute(2, 0, 1)
    elif box[2:] == (image_size, image_size):
        pixels = pixels.clone()  # no resize: still a view of `image`
    return pixels.flip(2) if flip else pixels


def random_crop_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float],
                    rng: random.Random) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    Args:
      height, width: of the picture, pixels.
      scale: smallest and largest share of the area.
      ratio: smallest and largest width / height, drawn uniformly in its logarithm.
      rng: source of randomness.

    Returns:
      (top, left, height, width), inside the picture. Where ten draws do not fit: the largest centred box that keeps
      within `ratio`.

    Source: torchvision.transforms.v2.RandomResizedCrop (same algorithm, another generator).
    """
    lowest, highest = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(lowest, highest))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def cut_disc(image: np.ndarray) -> np.ndarray:
    """Cut a disc out of the middle of what is drawn on white, as sets of round icons show flags and signs.

    Args:
      image: (H, W, 3) uint8.

    Returns:
      (S, S, 3) uint8, white outside the disc, where S is the shorter side of the box around all that is not white, but
      at least DISC_MIN_SHARE of the longer one; the picture itself where it is all white.
    """
    red, green, blue = np.moveaxis(image < NEARLY_WHITE, 2, 0)  # (H, W) each; ten times as fast as np.any over the channels
    drawn = red | green | blue
    rows, columns = np.flatnonzero(np.any(drawn, axis=1)), np.flatnonzero(np.any(drawn, axis=0))
    if not len(rows):
        return image
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    side = int(max(min(height, width), math.ceil(DISC_MIN_SHARE * max(height, width))))
    square = np.full((side, side, 3), 255, dtype=np.uint8)
    top, left = (rows[0] + rows[-1] + 1 - side) // 2, (columns[0] + columns[-1] + 1 - side) // 2
    inside = image[max(0, top) : top + side, max(0, left) : left + side]
    y, x = max(0, -top), max(0, -left)
    square[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    across = np.arange(side) + 0.5 - side / 2
    square[across[:, None] ** 2 + across**2 > side**2 / 4] = 255
    return square


def random_affine(size: int, image_size: int, config: AugmentConfig, rng: random.Random) -> tuple[float, ...] | None:
    """Draw a rotation, shear, zoom and shift about the centre, as one map.

    Args:
      size: side of the picture that is read, pixels.
      image_size: side of the result, pixels.
      config: rotate_degrees, shear_degrees, translate (uniform either way) and zoom (uniform between its two values).
      rng: source of randomness.

    Returns:
      (a, b, c, d, e, f) of Pillow's AFFINE: pixel (x, y) of the result comes from (ax + by + c, dx + ey + f). None
      where every one of the settings is neutral.
    """
    if not (config.rotate_degrees or config.shear_degrees or config.translate) and config.zoom == (1, 1):
        return None
    angle = math.radians(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
    shear = math.tan(math.radians(rng.uniform(-config.shear_degrees, config.shear_degrees)))
    zoom = rng.uniform(*config.zoom)
    shift_x, shift_y = (size * rng.uniform(-config.translate, config.translate) for _ in range(2))
    # Inverse of: shear along x, rotate, zoom, shift.
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    a, b, d, e = cos + shear * sin, sin - shear * cos, -sin, cos
    x, y = size / 2 + shift_x, size / 2 + shift_y  # where the centre goes
    scale = size / image_size
    return scale * a, scale * b, size / 2 - a * x - b * y, scale * d, scale * e, size / 2 - d * x - e * y


def random_warp(image_size: int, size: int, affine: tuple[float, ...] | None, config: AugmentConfig,
                rng: random.Random) -> list[tuple[tuple[int, ...], tuple[float, ...]]] | None:
    """Draw a smooth elastic warp on a coarse grid, on top of the affine map.

    Args:
      image_size: side of the result, pixels.
      size: side of the picture that is read, pixels.
      affine: as `random_affine` gives it; None = the plain resize.
      config: elastic, the largest standard deviation of a grid point's shift; each picture draws its own up to that.
      rng: source of randomness.

    Returns:
      Pillow's MESH: (box of the result, corners in the source from the top left counter-clockwise) of each grid cell.
      None where `elastic` is 0.
    """
    if not config.elastic:
        return None
    a, b, c, d, e, f = affine or (size / image_size, 0, 0, 0, size / image_size, 0)
    strength = rng.random() * config.elastic * size
    edges = [round(image_size * number / WARP_CELLS) for number in range(WARP_CELLS + 1)]
    source = {(x, y): (a * x + b * y + c + rng.gauss(0, strength), d * x + e * y + f + rng.gauss(0, strength))
              for y in edges for x in edges}
    return [((left, top, right, bottom),
             (*source[left, top], *source[left, bottom], *source[right, bottom], *source[right, top]))
            for top, bottom in pairwise(edges) for left, right in pairwise(edges)]


def random_tone(config: AugmentConfig, rng: random.Random) -> np.ndarray | None:
    """Draw a tone curve: x ** g of each channel, log g uniform within +-config.gamma. (256,) uint8, or None."""
    if not config.gamma:
        return None
    exponent = math.exp(rng.uniform(-config.gamma, config.gamma))
    levels = 1 - LEVELS if config.keep_white else LEVELS
    curve = levels**exponent  # (256,)
    return (255 * (1 - curve if config.keep_white else curve) + 0.5).astype(np.uint8)


def recolour(picture: Image.Image, steps: list[tuple[str, Any]], keep_white: bool) -> Image.Image:
    """Apply colour changes as one matrix; with `keep_white` to the distance from white."""
    mean_colour = np.zeros(3) if keep_white else np.array(picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    matrix = colour_matrix(steps, mean_colour)  # (3, 4)
    if keep_white:  # 255 - M (255 - x) = M x + 255 (1 - M 1); contrast is then about white
        matrix[:, 3] = 255 * (1 - matrix[:, :3].sum(axis=1))
    return picture.convert("RGB", tuple(matrix.ravel().tolist()))


def random_colour(config: AugmentConfig, rng: random.Random) -> list[tuple[str, Any]]:
    """Draw the colour changes of one picture, in the order they apply.

    Args:
      config: colour_jitter (brightness, contrast, saturation, hue: factors and ranges of torchvision's ColorJitter, in
        random order) with colour_jitter_probability; then colour_noise, and the probabilities of channel_shuffle, grey.
      rng: source of randomness.

    Returns:
      Steps for `colour_matrix`; empty where nothing changes.
    """
    steps: list[tuple[str, Any]] = []
    if any(config.colour_jitter) and rng.random() < config.colour_jitter_probability:
        brightness, contrast, saturation, hue = config.colour_jitter
        steps = [(name, rng.uniform(max(0.0, 1 - strength), 1 + strength)) for name, strength in
                 (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)) if strength]
        if hue:
            steps.append(("hue", rng.uniform(-hue, hue)))
        rng.shuffle(steps)
    if config.colour_noise:
        steps.append(("mixing", [[rng.gauss(0, config.colour_noise) for _ in range(3)] for _ in range(3)]))
    if rng.random() < config.channel_shuffle:
        steps.append(("channels", rng.sample(range(3), 3)))
    if rng.random() < config.grey:
        steps.append(("saturation", 0.0))
    return steps


def colour_matrix(steps: list[tuple[str, Any]], mean_colour: np.ndarray) -> np.ndarray:
    """Compose colour changes into one affine map of RGB.

    Brightness, contrast, saturation and grey are torchvision's, except that values are rounded and clamped once at the
    end and not after each step. Hue is a rotation of the chroma plane (YIQ), which keeps the luma; torchvision's goes
    round the HSV hexagon, which does not, and costs 30 times as much.

    Args:
      steps: ("brightness" | "contrast" | "saturation", factor), 1 = unchanged; ("hue", turns), from -0.5 to 0.5;
        ("mixing", 3x3 added to the identity); ("channels", permutation of 0, 1, 2).
      mean_colour: (3,) mean of the picture, 0 .. 255; contrast changes about its grey.

    Returns:
      (3, 4): new = matrix[:, :3] @ rgb + matrix[:, 3], in 0 .. 255.
    """
    matrix, offset = IDENTITY, np.zeros(3)
    for name, value in steps:
        shift = 0.0
        if name == "brightness":
            step = value * IDENTITY
        elif name == "contrast":
            step = value * IDENTITY
            shift = (1 - value) * (LUMA @ (matrix @ mean_colour + offset))
        elif name == "saturation":
            step = value * IDENTITY + (1 - value) * LUMA
        elif name == "hue":
            cos, sin = math.cos(2 * math.pi * value), math.sin(2 * math.pi * value)
            step = YIQ_TO_RGB @ np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]) @ RGB_TO_YIQ
        elif name == "mixing":
            step = IDENTITY + np.array(value)
        else:
            step = IDENTITY[value]
        matrix, offset = step @ matrix, step @ offset + shift
    return np.concatenate([matrix, offset[:, None]], axis=1)
