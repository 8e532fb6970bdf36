"""The pictures that an export is compared on: made here, so that they are the same everywhere."""

from PIL import Image

# Where a crop takes pixels off, it takes an even number, whatever the model's size: of an odd one, libraries cut the one
# pixel too many at different sides.
SIZES = ((64, 64), (120, 40), (200, 600), (900, 300))  # width, height


def fixed_pictures() -> list[Image.Image]:
    """Coloured gradients, smaller and larger than most models' pictures, upright and lying."""
    gradient = Image.radial_gradient("L")
    picture = Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.ROTATE_90), Image.linear_gradient("L")))
    return [picture.resize(size) for size in SIZES]
