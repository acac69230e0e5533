"""A training image, varied: encoded bytes and random numbers in, pixels out.

Knows no order and no batches: whoever calls gives each sample its own random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from cvt_model.image_file import open_image
from cvt_model.image_processor import CvtImageProcessor
from pipeline.finetune.config import AugmentConfig
from pipeline.finetune.policies import Rng, randaugment, trivialaugment

Pixels = npt.NDArray[np.uint8]
CROP_TRIES = 10
ERASE_TRIES = 10
ERASE_AREA = (0.02, 1 / 3)  # of the image, and height over width below: arXiv 1708.04896
ERASE_RATIO = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, for one size of pixels."""

    config: AugmentConfig
    processor: CvtImageProcessor  # evaluation's, which the crop is measured by
    max_pixels: int

    def __call__(self, data: bytes | memoryview, size: int, rng: Rng) -> Pixels:
        """An encoded image to pixels (size, size, 3); the same numbers give the same pixels.

        Raises ImageError for what is no image.
        """
        config = self.config
        pixels = self._cropped(open_image(bytes(data), self.max_pixels).image_rgb, size, rng)
        if rng.random() < config.flip:
            pixels = pixels[:, ::-1]
        if config.policy == "randaugment":
            image = Image.fromarray(pixels)
            pixels = np.asarray(
                randaugment(image, rng, config.num_ops, config.magnitude, config.magnitude_std)
            )
        elif config.policy == "trivialaugment":
            pixels = np.asarray(trivialaugment(Image.fromarray(pixels), rng))
        return erase(pixels, rng) if rng.random() < config.erasing else pixels

    def _cropped(self, image: Image.Image, size: int, rng: Rng) -> Pixels:
        if self.config.crop == "random_resized":
            box = random_box(image.size, self.config.scale, self.config.ratio, rng)
            return np.asarray(image.resize((size, size), self.processor.resample, box))
        whole = sized(self.processor, size).to_pixels(image)
        if self.config.crop == "none":
            return whole
        return shift(whole, round(self.config.padding * size / pixels_of(self.processor)), rng)


def pixels_of(processor: CvtImageProcessor) -> int:
    """Pixels a side of what the processor makes; ValueError where that is no square."""
    if processor.output_size is None or len(set(processor.output_size)) != 1:
        raise ValueError("preprocessing: training needs square images; set size, without another crop_size")
    return processor.output_size[0]


@lru_cache(maxsize=16)
def sized(processor: CvtImageProcessor, size: int) -> CvtImageProcessor:
    """The processor for another size, that keeps the same part of an image."""
    scale = size / pixels_of(processor)
    crop_size = (size, size) if processor.do_center_crop else processor.crop_size
    resized = round(processor.size * scale)
    return processor.model_copy(update={"size": resized, "crop_size": crop_size})


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: Rng
) -> tuple[int, int, int, int]:
    """A random part of an image (width, height): share of its area and shape within these bounds.

    Where none fits, the centre, as near to the shape as the image allows. Inception's crop, as
    torchvision's RandomResizedCrop draws it.
    """
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def shift(pixels: Pixels, padding: int, rng: Rng) -> Pixels:
    """Moved by up to `padding` pixels each way; what comes in is the image's mirror."""
    if not padding:
        return pixels
    height, width, _ = pixels.shape
    down, right = rng.integers(-padding, padding, endpoint=True, size=2)
    return pixels[mirrored(height, int(down))[:, None], mirrored(width, int(right))]


@lru_cache(maxsize=1024)
def mirrored(length: int, moved: int) -> npt.NDArray[np.int64]:
    """The places of an axis from `moved` on, those beyond its ends mirrored."""
    places = np.arange(moved, moved + length)
    places = np.where(places < 0, -1 - places, places)
    return np.where(places >= length, 2 * length - 1 - places, places)


def erase(pixels: Pixels, rng: Rng) -> Pixels:
    """A random rectangle replaced by noise (random erasing, arXiv 1708.04896)."""
    height, width, _ = pixels.shape
    for _ in range(ERASE_TRIES):
        area = height * width * rng.uniform(*ERASE_AREA)
        aspect = math.exp(rng.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h, endpoint=True), rng.integers(width - w, endpoint=True)
            erased = pixels.copy()
            erased[top : top + h, left : left + w] = rng.integers(256, size=(h, w, 3), dtype=np.uint8)
            return erased
    return pixels
