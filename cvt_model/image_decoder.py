"""Bytes to the pixels that a network takes, exactly or fast.

What enters: the bytes of one file and a processor. What leaves: its pixels with the original's size and
format, or an `ImageError`. Exact is the reference's resize and crop, bit for bit. Fast makes what is kept
in one resize, of a JPEG that its decoder has already made smaller, with a narrower filter: a few grey
levels from exact.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from cvt_model.image_file import Size, StoredImage, open_image, open_stored, turn
from cvt_model.image_processor import (
    MAX_RESIZED_PIXELS,
    CvtImageProcessor,
    Pixels,
    center_crop,
    crop_start,
)

Box = tuple[float, float, float, float]  # left, top, right, bottom

# A JPEG is decoded no smaller than so many times what it is resized to: nearer than that the coarse
# pixels of a half, a quarter or an eighth show.
DRAFT_GAP = 1.25
WIDE_FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)

T = Image.Transpose
# By transposition: whether it swaps the axes, and which axes of the stored image then run backwards.
TURNS = {
    None: (False, False, False),
    T.FLIP_LEFT_RIGHT: (False, True, False),
    T.ROTATE_180: (False, True, True),
    T.FLIP_TOP_BOTTOM: (False, False, True),
    T.TRANSPOSE: (True, False, False),
    T.ROTATE_270: (True, False, True),
    T.TRANSVERSE: (True, True, True),
    T.ROTATE_90: (True, True, False),
}


class DecodedImage(NamedTuple):
    """Pixels for the network, and what the original was."""

    pixels: Pixels  # (height, width, 3) of the processor's size
    width: int  # of the original, as stored
    height: int
    format: str


def decode_image(
    data: bytes, processor: CvtImageProcessor, max_pixels: int | None, *, fast: bool = False
) -> DecodedImage:
    """Decode and preprocess an image; the one way from bytes to pixels, whoever needs them.

    Raises ImageError for what is no image, is broken or has more than `max_pixels` pixels.
    """
    if not fast or not processor.do_resize:
        image = open_image(data, max_pixels)
        return DecodedImage(processor.to_pixels(image.image_rgb), image.width, image.height, image.format)

    def draft(size: Size) -> Size:
        height, width = processor.resized_size(*size)
        return math.ceil(width * DRAFT_GAP), math.ceil(height * DRAFT_GAP)

    stored = open_stored(data, max_pixels, draft)
    pixels = processor.crop(resize_fast(stored, processor))
    return DecodedImage(pixels, stored.width, stored.height, stored.format)


def resize_fast(stored: StoredImage, processor: CvtImageProcessor) -> Pixels:
    """As `processor.resize` of the upright image, in one step to what it keeps, turned afterwards."""
    image, square = stored.image_rgb, (processor.size, processor.size)
    swapped, *_ = TURNS[stored.transposition]
    resized = processor.resized_size(*(stored.size[::-1] if swapped else stored.size))
    if math.prod(resized) > max(MAX_RESIZED_PIXELS, math.prod(square)):  # a thread of pixels
        return processor.resize(turn(image, stored.transposition))
    (top, height), (left, width) = map(kept_part, resized, square)
    box = stored_box(
        (left / resized[1], top / resized[0], (left + width) / resized[1], (top + height) / resized[0]),
        stored,
    )
    size = (height, width) if swapped else (width, height)
    part = image.resize(size, fast_filter(stored, box, size, processor.resample), box)
    return center_crop(np.asarray(turn(part, stored.transposition)), square)


def kept_part(resized: int, kept: int) -> tuple[int, int]:
    """Where the central `kept` of an axis begins, and its length: all, where that is shorter."""
    start = max(crop_start(resized, kept), 0)
    return start, min(kept, resized)


def stored_box(upright: Box, stored: StoredImage) -> Box:
    """A box given in shares of the upright image, in pixels of the stored one."""
    swap, x_backwards, y_backwards = TURNS[stored.transposition]
    x0, y0, x1, y1 = upright
    if swap:
        x0, y0, x1, y1 = y0, x0, y1, x1
    if x_backwards:
        x0, x1 = 1 - x1, 1 - x0
    if y_backwards:
        y0, y1 = 1 - y1, 1 - y0
    width, height = stored.image_rgb.size
    return x0 * width, y0 * height, min(x1 * width, width), min(y1 * height, height)


def fast_filter(stored: StoredImage, box: Box, size: Size, resample: int) -> int:
    """Hamming's window for a wide one where an image shrinks: half the work, and nearly as sharp.

    Not after a draft: the resize is then a small part of the work, and its filter makes up for the draft's.
    """
    shrinks = box[2] - box[0] > size[0] and box[3] - box[1] > size[1]
    drafted = stored.image_rgb.size != stored.size
    return Image.Resampling.HAMMING if resample in WIDE_FILTERS and shrinks and not drafted else resample
