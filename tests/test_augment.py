"""Augmentation against torchvision and slow references, its limits, and what it draws from."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from clipkit.config.data import AugmentConfig
from clipkit.data.augment import (
    augment,
    colour_matrix,
    cut_disc,
    random_affine,
    random_colour,
    random_crop_box,
    random_tone,
    random_warp,
)
from clipkit.data.decode import crop_and_resize

NEUTRAL: dict[str, Any] = {
    "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "rotate_degrees": 0.0, "translate": 0.0,
    "zoom": (1.0, 1.0), "shear_degrees": 0.0, "colour_jitter": (0.0, 0.0, 0.0, 0.0), "colour_jitter_probability": 1.0,
    "disc": 0.0, "elastic": 0.0, "colour_noise": 0.0, "gamma": 0.0, "sharpness": 0.0, "keep_white": False,
    "grey": 0.0, "channel_shuffle": 0.0}
EVERYTHING: dict[str, Any] = {
    "crop_scale": (0.5, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5, "rotate_degrees": 15.0, "translate": 0.1,
    "zoom": (0.7, 1.3), "shear_degrees": 6.0, "colour_jitter": (0.3, 0.3, 0.4, 0.1), "colour_jitter_probability": 0.8,
    "disc": 0.3, "elastic": 0.04, "colour_noise": 0.04, "gamma": 0.25, "sharpness": 0.5, "keep_white": False,
    "grey": 0.2, "channel_shuffle": 0.5}


def settings(**changes: Any) -> AugmentConfig:
    return AugmentConfig(**(NEUTRAL | changes))


def picture(height: int = 64, width: int = 64) -> np.ndarray:
    """A seeded picture (H, W, 3) without values near 0 or 255, which colour changes would clamp."""
    return np.random.default_rng(0).integers(70, 150, (height, width, 3), dtype=np.uint8)


def changed(image: np.ndarray, seed: int = 0, **changes: Any) -> np.ndarray:
    """The augmented picture (S, S, 3) at its own size."""
    tensor = augment(image, image_size=image.shape[0], config=settings(**changes), rng=random.Random(seed))
    return tensor.permute(1, 2, 0).numpy()


def test_neutral_settings_give_the_resized_picture_alone() -> None:
    for height, width, size in ((64, 64, 64), (64, 64, 48), (100, 100, 32)):
        image = picture(height, width)
        expected = crop_and_resize(image, (0, 0, height, width), size)
        result = augment(image, image_size=size, config=settings(), rng=random.Random(0))
        assert torch.equal(result, expected)
        assert result.shape == (3, size, size)
        assert result.dtype == torch.uint8
        assert result.permute(1, 2, 0).is_contiguous()  # channels last


def test_one_seed_gives_one_picture_and_global_randomness_plays_no_part() -> None:
    image, config, before = picture(80, 60), AugmentConfig(**EVERYTHING), picture(80, 60)

    def run(seed: int) -> torch.Tensor:
        return augment(image, image_size=48, config=config, rng=random.Random(seed))

    first = [run(seed) for seed in range(20)]
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    states = random.getstate(), torch.get_rng_state(), str(np.random.get_state())
    assert all(torch.equal(run(seed), first[seed]) for seed in range(20))
    assert len({tensor.numpy().tobytes() for tensor in first}) == 20
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert str(np.random.get_state()) == states[2]
    assert (image == before).all()


def test_the_result_never_shares_memory_with_the_picture() -> None:
    image = picture()
    result = augment(image, image_size=64, config=settings(), rng=random.Random(0))
    result.zero_()
    assert (image == picture()).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 200), (200, 50), (1, 1), (1, 500), (3, 2)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0), (1.0, 1.0)])
def test_every_crop_box_lies_inside_the_picture(height: int, width: int, scale: tuple[float, float]) -> None:
    rng = random.Random(0)
    for _ in range(200):
        top, left, h, w = random_crop_box(height, width, scale, (3 / 4, 4 / 3), rng)
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        assert h >= 1
        assert w >= 1


def test_crop_boxes_are_distributed_as_torchvisions() -> None:
    height, width, scale, ratio = 60, 90, (0.2, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    crop, blank = RandomResizedCrop(8, scale=scale, ratio=ratio), torch.zeros(3, height, width)
    theirs = [crop.make_params([blank]) for _ in range(3000)]
    theirs = np.array([[box["top"], box["left"], box["height"], box["width"]] for box in theirs])
    rng = random.Random(0)
    ours = np.array([random_crop_box(height, width, scale, ratio, rng) for _ in range(3000)])
    for column in range(4):
        values = np.arange(91)
        gap = np.abs((ours[:, column, None] <= values).mean(0) - (theirs[:, column, None] <= values).mean(0)).max()
        assert gap < 1.95 * math.sqrt(2 / 3000)  # Kolmogorov-Smirnov at 0.1 %


def test_a_picture_too_long_for_the_ratio_gives_torchvisions_centred_box() -> None:
    ratio = (3 / 4, 4 / 3)
    crop = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=ratio)
    for height, width in ((20, 200), (200, 20), (30, 31), (40, 40), (7, 100)):
        box = crop.make_params([torch.zeros(3, height, width)])
        ours = random_crop_box(height, width, (1.0, 1.0), ratio, random.Random(0))
        if box["height"] * box["width"] < height * width or height == width:
            assert ours == (box["top"], box["left"], box["height"], box["width"])


def test_a_certain_flip_mirrors_left_and_right() -> None:
    assert (changed(picture(), flip=1.0) == picture()[:, ::-1]).all()
    flipped = sum((changed(picture(), seed=seed, flip=0.25) != picture()).any() for seed in range(400))
    assert 70 < flipped < 130  # 100 expected, standard deviation 9


def slow_affine(image: np.ndarray, angle: float, shear: float, zoom: float, shift: tuple[float, float]) -> np.ndarray:
    """Each pixel looked up by hand: shear along x, rotate, zoom, shift about the centre; bilinear, white outside."""
    size, turn = len(image), math.radians(angle)
    forward = zoom * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    forward = forward @ np.array([[1, math.tan(math.radians(shear))], [0, 1]])
    result = np.full(image.shape, 255.0)
    for row in range(size):
        for column in range(size):
            centred = np.array([column + 0.5, row + 0.5]) - size / 2 - shift
            x, y = np.linalg.solve(forward, centred) + size / 2
            if 0 <= x < size and 0 <= y < size:
                x, y = x - 0.5, y - 0.5
                left, top = math.floor(x), math.floor(y)
                weights = ((1 - y + top) * (1 - x + left), (1 - y + top) * (x - left),
                           (y - top) * (1 - x + left), (y - top) * (x - left))
                places = ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1))
                result[row, column] = sum(weight * image[min(max(i, 0), size - 1), min(max(j, 0), size - 1)]
                                          for weight, (i, j) in zip(weights, places, strict=True))
    return result


@pytest.mark.parametrize("changes", [
    {"rotate_degrees": 90.0}, {"shear_degrees": 30.0}, {"zoom": (0.5, 0.5)}, {"zoom": (2.0, 2.0)}, {"translate": 0.25},
    {"rotate_degrees": 45.0, "shear_degrees": 20.0, "zoom": (0.6, 1.4), "translate": 0.2}])
def test_an_affine_equals_a_slow_pixel_by_pixel_one(changes: dict[str, Any]) -> None:
    class Fixed(random.Random):
        """Every uniform draw at 0.8 of its range."""

        def random(self) -> float:
            return 0.8

    config, image = settings(**changes), picture(24, 24)
    ours = augment(image, image_size=24, config=config, rng=Fixed()).permute(1, 2, 0).numpy()
    at = [0.6 * most for most in (config.rotate_degrees, config.shear_degrees, 24 * config.translate)]
    zoom = config.zoom[0] + 0.8 * (config.zoom[1] - config.zoom[0])
    expected = slow_affine(image, at[0], at[1], zoom, (at[2], at[2]))
    away = np.abs(ours - expected)
    assert np.quantile(away, 0.99) <= 1  # one level of rounding; a pixel on the very border may fall either way
    if changes != {"zoom": (2.0, 2.0)}:
        assert (ours == 255).all(axis=-1).any()
        assert np.mean((ours == 255) != (expected == 255)) < 0.01


def test_an_affine_does_not_blur_a_larger_picture() -> None:
    identity = settings(zoom=(1.0, 1.0 + 1e-12))  # takes the affine's way and changes nothing
    for height, width, size in ((64, 64, 32), (48, 48, 32), (64, 64, 64)):
        image = picture(height, width)
        ours = augment(image, image_size=size, config=identity, rng=random.Random(0)).float()
        plain = augment(image, image_size=size, config=settings(), rng=random.Random(0)).float()
        assert ours.std() > 0.8 * plain.std()  # noise loses its contrast where it is blurred
        assert (ours.mean() - plain.mean()).abs() < 1.5


def test_affine_draws_stay_within_their_settings() -> None:
    rng = random.Random(0)
    assert random_affine(32, 32, settings(), rng) is None
    maps = np.array([random_affine(32, 32, settings(rotate_degrees=10.0, zoom=(0.8, 1.25), translate=0.1), rng)
                     for _ in range(500)])  # (500, 6)
    angle = np.degrees(np.arctan2(-maps[:, 3], maps[:, 0]))
    zoom = 1 / np.sqrt(maps[:, 0] ** 2 + maps[:, 3] ** 2)
    assert 9 < np.abs(angle).max() <= 10 + 1e-9
    assert zoom.min() >= 0.8 - 1e-9
    assert zoom.max() <= 1.25 + 1e-9
    assert zoom.min() < 0.82
    assert zoom.max() > 1.22
    assert abs(angle.mean()) < 1


@pytest.mark.parametrize(("name", "factor", "reference"), [
    ("brightness", 1.3, transforms.adjust_brightness), ("brightness", 0.6, transforms.adjust_brightness),
    ("contrast", 1.4, transforms.adjust_contrast), ("contrast", 0.3, transforms.adjust_contrast),
    ("saturation", 1.5, transforms.adjust_saturation), ("saturation", 0.0, transforms.adjust_saturation)])
def test_brightness_contrast_and_saturation_are_torchvisions(name: str, factor: float, reference: Any) -> None:
    image = picture()
    expected = reference(torch.from_numpy(image).permute(2, 0, 1).float() / 255, factor).permute(1, 2, 0).numpy() * 255
    # torchvision's grey weighs red by 0.2989
    assert np.abs(recoloured(image, [(name, factor)]) - expected).max() < 0.1


def recoloured(image: np.ndarray, steps: list[tuple[str, Any]]) -> np.ndarray:
    matrix = colour_matrix(steps, image.reshape(-1, 3).mean(0))
    return image @ matrix[:, :3].T + matrix[:, 3]


def test_colour_changes_compose_in_their_order() -> None:
    image = picture()
    steps: list[tuple[str, Any]] = [("contrast", 0.8), ("hue", 0.05), ("brightness", 1.1), ("channels", [2, 0, 1]),
                                    ("saturation", 0.7)]
    one_by_one = image.astype(float)
    for step in steps:
        one_by_one = recoloured(one_by_one, [step])
    assert np.allclose(recoloured(image, steps), one_by_one)
    assert not np.allclose(recoloured(image, steps[::-1]), one_by_one, atol=1)


def test_a_hue_change_keeps_greys_and_luma_and_turns_as_torchvisions() -> None:
    greys = np.repeat(np.arange(0, 256, 5)[:, None, None], 3, axis=2).astype(float)
    assert np.allclose(recoloured(greys, [("hue", 0.3)]), greys, atol=0.5)  # the three-digit NTSC table
    luma = np.array([0.299, 0.587, 0.114])
    assert np.allclose(recoloured(picture(), [("hue", 0.2)]) @ luma, picture() @ luma, atol=1e-6)
    assert np.allclose(recoloured(picture(), [("hue", 1.0)]), picture())
    red = np.array([[[200.0, 60.0, 60.0]]])
    towards = transforms.adjust_hue(torch.tensor(red / 255).permute(2, 0, 1), 0.1).permute(1, 2, 0).numpy() * 255 - red
    assert np.sum((recoloured(red, [("hue", 0.1)]) - red) * towards) > 0


def test_the_picture_is_recoloured_by_the_steps_that_were_drawn() -> None:
    config = settings(colour_jitter=(0.3, 0.3, 0.3, 0.1))
    for seed in range(10):
        rng = random.Random(seed)
        random_crop_box(64, 64, (1.0, 1.0), (1.0, 1.0), rng)
        rng.random()  # the flip
        expected = recoloured(picture(), random_colour(config, rng)).clip(0, 255)
        ours = changed(picture(), seed=seed, colour_jitter=(0.3, 0.3, 0.3, 0.1))
        assert np.abs(ours - expected).max() <= 1  # rounding, and the mean colour in whole levels


def test_a_certain_grey_has_equal_channels() -> None:
    ours = changed(picture(), grey=1.0).astype(float)
    assert np.abs(ours - ours.mean(axis=-1, keepdims=True)).max() == 0
    assert np.abs(ours[..., 0] - picture() @ [0.299, 0.587, 0.114]).max() <= 0.51


def test_a_channel_shuffle_gives_all_six_orders() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:] = (10, 20, 30)
    seen = {tuple(changed(image, seed=seed, channel_shuffle=1.0)[0, 0].tolist()) for seed in range(100)}
    assert seen == {(a, b, 60 - a - b) for a in (10, 20, 30) for b in (10, 20, 30) if a != b}


def test_colour_draws_follow_their_probability_and_strength() -> None:
    rng = random.Random(0)
    assert random_colour(settings(), rng) == []
    draws = [random_colour(settings(colour_jitter=(0.4, 0.0, 2.0, 0.1), colour_jitter_probability=0.7), rng)
             for _ in range(1000)]
    taken = [dict(steps) for steps in draws if steps]
    assert 650 < len(taken) < 750
    assert all(set(steps) == {"brightness", "saturation", "hue"} for steps in taken)
    for name, low, high in (("brightness", 0.6, 1.4), ("saturation", 0.0, 3.0), ("hue", -0.1, 0.1)):
        values = [steps[name] for steps in taken]
        assert low <= min(values)
        assert max(values) <= high
        assert max(values) - min(values) > 0.95 * (high - low)
    assert len({tuple(name for name, _ in steps) for steps in draws if steps}) == 6


def test_white_stays_white_under_every_colour_change_with_keep_white() -> None:
    image = picture()
    image[:20] = 255
    strong = {"colour_jitter": (0.5, 0.5, 0.5, 0.2), "colour_noise": 0.1, "gamma": 0.5, "grey": 0.3, "channel_shuffle": 0.5}
    moved = lost = 0
    for seed in range(20):
        result = changed(image, seed, keep_white=True, **strong)
        assert (result[:20] >= 254).all()  # a rounding of the matrix
        moved += not np.array_equal(result[20:], image[20:])
        lost += not np.array_equal(changed(image, seed, keep_white=False, **strong)[:20], image[:20])
    assert moved == 20
    assert lost > 10  # without it most are not kept


def test_a_warp_of_no_strength_is_the_affine_and_a_strong_one_moves_grid_points_by_its_deviation() -> None:
    config, size = settings(rotate_degrees=10.0, zoom=(0.8, 1.2), elastic=1e-9), 64
    image = Image.fromarray(picture())
    affine = random_affine(size, size, config, random.Random(3))
    mesh = random_warp(size, size, affine, config, random.Random(4))
    assert affine is not None
    assert mesh is not None
    straight = image.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=(255,) * 3)
    warped = image.transform((size, size), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR, fillcolor=(255,) * 3)
    inner = np.abs(np.asarray(straight, np.int64) - np.asarray(warped, np.int64))[16:48, 16:48]
    assert inner.mean() < 8  # of 80 grey levels of noise: quads and maps round pixel centres differently
    points = [mesh[0][1][0] for mesh in (random_warp(size, size, None, settings(elastic=0.05), random.Random(seed))
                                         for seed in range(2000)) if mesh]
    expected = 0.05 * size / math.sqrt(3)  # a normal times a uniform from 0 to 1: deviation / sqrt(3)
    assert abs(np.std(points) - expected) < 0.1 * expected
    assert random_warp(size, size, affine, settings(), random.Random(0)) is None


def test_the_tone_curve_is_a_power_and_keeps_both_ends() -> None:
    for keep_white in (False, True):
        curve = random_tone(settings(gamma=0.5, keep_white=keep_white), random.Random(1))
        assert curve is not None
        exponent = math.exp(random.Random(1).uniform(-0.5, 0.5))
        level = 100
        wanted = 255 - 255 * (1 - level / 255) ** exponent if keep_white else 255 * (level / 255) ** exponent
        assert (curve[0], curve[255]) == (0, 255)
        assert abs(int(curve[level]) - wanted) <= 1
    assert random_tone(settings(), random.Random(1)) is None


def test_sharpness_goes_towards_and_away_from_the_3x3_mean() -> None:
    image = picture()
    mean = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(1)), np.float64)
    for seed in range(4):
        rng = random.Random(seed)
        augment(image, image_size=64, config=settings(), rng=rng)  # the draws before it
        amount = rng.uniform(-0.5, 0.5)
        wanted = image + amount * (mean - image)
        found = changed(image, seed, sharpness=0.5)
        assert np.abs(found - wanted).max() <= 1.0


def test_a_disc_keeps_the_middle_of_a_flag_and_turns_the_rest_white() -> None:
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    image[9:55, 2:62] = picture(46, 60)  # a flag of 60 x 46 pixels
    disc = cut_disc(image)
    assert disc.shape == (46, 46, 3)
    for y in range(46):
        for x in range(46):
            inside = (y + 0.5 - 23) ** 2 + (x + 0.5 - 23) ** 2 <= 23**2
            assert (disc[y, x] == (image[9 + y, 9 + x] if inside else 255)).all()


def test_a_disc_of_a_long_thin_drawing_keeps_two_thirds_of_its_length() -> None:
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    image[30:34, 2:62] = 0
    assert cut_disc(image).shape == (40, 40, 3)
    image[:] = 255
    image[0:2, 0:48] = 0  # at the edge, where the square reaches out of the picture
    disc = cut_disc(image)
    assert disc.shape == (32, 32, 3)
    assert (disc[15:17, 1:31] == 0).all()
    assert (disc[:14] == 255).all()


def test_a_disc_of_nothing_is_the_picture() -> None:
    image = np.full((8, 8, 3), 255, dtype=np.uint8)
    assert cut_disc(image) is image


def test_discs_are_cut_as_often_as_asked() -> None:
    image = picture()
    cut = sum(changed(image, seed, disc=0.3)[0, 0].min() == 255 for seed in range(400))
    assert 90 <= cut <= 150  # 120 +- 3 standard deviations
