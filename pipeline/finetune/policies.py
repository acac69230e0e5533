"""Random operations on an image's colours and shape: RandAugment and TrivialAugment, with Pillow.

RandAugment (arXiv 1909.13719) in the form that DeiT's and CvT's recipes use: fifteen operations, each
applied half of the time, stronger with the magnitude. TrivialAugment (arXiv 2103.10158) in its wide form:
one operation of fourteen, its strength uniform over 31 levels. Both move an image by shares of its size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Rng = np.random.Generator
Operation = Callable[[Image.Image, float, Rng], Image.Image]
"""An RGB image and a strength from 0 to 1, to an image of the same size."""

FILL = (124, 116, 104)  # what comes in at the edges: the mean colour of ImageNet
APPLY = 0.5  # of RandAugment's operations
LEVELS = 31  # of TrivialAugment's strengths


def randaugment(image: Image.Image, rng: Rng, num_ops: int, magnitude: float, std: float) -> Image.Image:
    """`num_ops` random operations, each applied half of the time; `magnitude` is from 0 to 10."""
    for number in rng.integers(len(RANDAUGMENT), size=num_ops):
        if rng.random() < APPLY:
            strength = float(np.clip(rng.normal(magnitude, std) if std else magnitude, 0, 10)) / 10
            image = RANDAUGMENT[number](image, strength, rng)
    return image


def trivialaugment(image: Image.Image, rng: Rng) -> Image.Image:
    """One random operation of random strength."""
    operation = TRIVIALAUGMENT[rng.integers(len(TRIVIALAUGMENT))]
    return operation(image, float(rng.integers(LEVELS)) / (LEVELS - 1), rng)


def identity(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    return image


def autocontrast(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    return ImageOps.equalize(image)


def invert(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    return ImageOps.invert(image)


def solarize_add(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    """Add up to 110 to the values below 128."""
    added = round(strength * 110)
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def posterize(most: int, least: int) -> Operation:
    """Keep `most` bits of each value, or fewer, down to `least`."""

    def operate(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
        bits = most - int(strength * (most - least))
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)

    return operate


def solarize(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    """Invert the values from a threshold on, which falls from 256 to 0."""
    return ImageOps.solarize(image, 256 - round(strength * 256))


def rotate(degrees: float) -> Operation:
    def operate(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
        return image.rotate(_either(rng) * strength * degrees, Image.Resampling.BILINEAR, fillcolor=FILL)

    return operate


def affine(*, shear_x: float = 0, shear_y: float = 0, move_x: float = 0, move_y: float = 0) -> Operation:
    """Shear or move, by up to these shares of the image."""

    def operate(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
        share = _either(rng) * strength
        width, height = image.size
        rows = (1, share * shear_x, share * move_x * width, share * shear_y, 1, share * move_y * height)
        return image.transform(
            image.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR, fillcolor=FILL
        )

    return operate


def enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance], most: float) -> Operation:
    """More or less of a property, by up to `most`."""

    def operate(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
        return kind(image).enhance(1 + _either(rng) * strength * most)

    return operate


def _either(rng: Rng) -> int:
    return 1 if rng.random() < 0.5 else -1


def _colours(most: float) -> tuple[Operation, ...]:
    kinds = (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
    return tuple(enhance(kind, most) for kind in kinds)


RANDAUGMENT: tuple[Operation, ...] = (
    *(autocontrast, equalize, invert, solarize, solarize_add, posterize(4, 0), rotate(30)),
    *_colours(0.9),
    *(affine(shear_x=0.3), affine(shear_y=0.3), affine(move_x=0.45), affine(move_y=0.45)),
)
TRIVIALAUGMENT: tuple[Operation, ...] = (
    *(identity, autocontrast, equalize, solarize, posterize(8, 2), rotate(135)),
    *_colours(0.99),
    *(affine(shear_x=0.99), affine(shear_y=0.99), affine(move_x=1 / 7), affine(move_y=1 / 7)),
)
