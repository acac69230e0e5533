"""A training image is varied as the configuration says, and repeatably."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cvt_model.image_processor import CvtImageProcessor
from pipeline.finetune.augment import Augmentation, erase, random_box, shift, sized
from pipeline.finetune.config import AugmentConfig
from pipeline.finetune.policies import (
    RANDAUGMENT,
    TRIVIALAUGMENT,
    affine,
    posterize,
    randaugment,
    rotate,
    solarize,
    solarize_add,
    trivialaugment,
)

PROCESSOR = CvtImageProcessor.from_dict({"size": {"shortest_edge": 32}, "crop_pct": 1.0})
PLAIN = {"crop": "none", "flip": 0, "policy": "none", "erasing": 0}


def photo(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def vary(image: Image.Image, seed: int = 0, size: int = 32, **changes: object) -> np.ndarray:
    config = AugmentConfig.model_validate({**PLAIN, **changes})
    return Augmentation(config, PROCESSOR, 10**6)(encoded(image), size, np.random.default_rng(seed))


def test_without_any_variation_the_pixels_are_those_of_evaluation():
    assert np.array_equal(vary(photo()), PROCESSOR.to_pixels(photo()))
    assert np.array_equal(vary(photo(), size=24), sized(PROCESSOR, 24).to_pixels(photo()))
    assert np.array_equal(vary(photo(), flip=1), PROCESSOR.to_pixels(photo())[:, ::-1])


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_the_same_numbers_give_the_same_pixels_and_others_others(policy):
    changes = {"crop": "random_resized", "policy": policy, "erasing": 0.5, "flip": 0.5}
    varied = [vary(photo(), seed, **changes) for seed in range(12)]
    assert all(np.array_equal(vary(photo(), seed, **changes), varied[seed]) for seed in range(12))
    assert len({pixels.tobytes() for pixels in varied}) == 12
    assert all(pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 for pixels in varied)


def test_a_random_part_keeps_to_its_bounds():
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(500):
        left, top, right, bottom = random_box((60, 40), (0.2, 0.8), (3 / 4, 4 / 3), rng)
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40
        areas.append((right - left) * (bottom - top) / 2400)
        aspects.append((right - left) / (bottom - top))
    assert 0.17 < min(areas) < 0.25
    assert 0.6 < max(areas) < 0.83
    assert 0.7 < min(aspects) < max(aspects) < 1.45


def test_a_panorama_is_cropped_in_its_middle():
    box = random_box((1000, 10), (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert box == (493, 0, 506, 10) or box[2] - box[0] in (13, 14)


def test_a_shift_moves_by_at_most_the_padding_and_mirrors_what_comes_in():
    image = PROCESSOR.to_pixels(photo())
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="symmetric")
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    rng = np.random.default_rng(0)
    seen = {shift(image, 4, rng).tobytes() for _ in range(600)}
    assert seen <= windows
    assert len(seen) > 70  # of 81
    assert np.array_equal(shift(image, 0, rng), image)


def test_erasing_replaces_one_rectangle_of_the_asked_size():
    rng, pixels = np.random.default_rng(0), np.zeros((32, 32, 3), np.uint8)
    for _ in range(100):
        rows, columns = np.nonzero(erase(pixels, rng).any(axis=2))
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert 0.015 < area / 1024 < 0.36
        assert len(rows) > 0.95 * area  # all of the rectangle, but for noise that is black
    assert not pixels.any()


def test_operations_do_what_their_names_say():
    rng = np.random.default_rng(0)
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 8, 3)))
    column = lambda image: np.asarray(image)[:, 0, 0].astype(int)  # noqa: E731
    values = np.arange(256)
    assert np.array_equal(column(solarize(ramp, 0.5, rng)), np.where(values < 128, values, 255 - values))
    assert np.array_equal(column(solarize(ramp, 0, rng)), values)
    assert np.array_equal(column(posterize(8, 2)(ramp, 1.0, rng)), values & 0b11000000)
    assert not column(posterize(4, 0)(ramp, 1.0, rng)).any()
    assert np.array_equal(column(solarize_add(ramp, 0.5, rng)), values + 55 * (values < 128))
    moved = column(affine(move_y=0.25)(ramp, 1.0, rng))  # by 64 rows up or down
    inside = moved[64:192]
    assert np.array_equal(inside, values[:128]) or np.array_equal(inside, values[128:])
    turned = np.asarray(rotate(90)(Image.fromarray(np.asarray(ramp)[:8]), 1.0, rng))
    assert len(set(turned[4, :, 0])) > 4  # rows have become columns


@pytest.mark.parametrize("operation", range(len(RANDAUGMENT) + len(TRIVIALAUGMENT)))
def test_an_operation_keeps_the_size_and_at_no_strength_hardly_changes(operation):
    image, rng = photo(), np.random.default_rng(1)
    operate = (*RANDAUGMENT, *TRIVIALAUGMENT)[operation]
    for strength in (0.0, 0.5, 1.0):
        assert operate(image, strength, rng).size == image.size
        assert operate(image, strength, rng).mode == "RGB"


def test_randaugment_applies_half_of_its_operations():
    rng, image = np.random.default_rng(0), photo()
    same = sum(
        np.array_equal(np.asarray(randaugment(image, rng, 2, 9, 0.5)), np.asarray(image))
        for _ in range(300)
    )
    assert 45 < same < 120  # a quarter has none


def test_trivialaugment_draws_every_operation():
    rng, image = np.random.default_rng(0), photo()
    assert len({np.asarray(trivialaugment(image, rng)).tobytes() for _ in range(300)}) > 150
