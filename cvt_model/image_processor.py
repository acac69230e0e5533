"""Preprocessing: decoded images to the pixels that a CvT network was trained on.

What enters: a `preprocessor_config.json` dict and RGB images. What leaves: uint8 pixels, equal bit
for bit to those of transformers' `ConvNextImageProcessorPil` (the processor of CvT), and
normalised tensors. It must not know files, storage or the network.
Shape suffixes: B batch, H height, W width, C the three channels.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from cvt_model.errors import ImageError
from cvt_model.image_file import OpenedImage, open_image
from cvt_model.validation import describe_validation_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CvtImageProcessor", "ImageError", "OpenedImage", "open_image"]

Pixels = npt.NDArray[np.uint8]
Channels = tuple[float, float, float]

WARP_FROM = 384  # from this size on the reference warps to a square and crops nothing
# An image whose resized form has more pixels than this is resized only where it is kept. It is
# then a thousand times as long as wide, and the whole would take gigabytes to throw away.
MAX_RESIZED_PIXELS = 2**26
WIDEST_FILTER = 3.0  # Lanczos reaches so many pixels to either side
PROCESSOR_TYPES = ("ConvNextImageProcessor", "ConvNextFeatureExtractor", "CvtFeatureExtractor")


class CvtImageProcessor(BaseModel):
    """The settings of transformers' `ConvNextImageProcessor`, with its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    do_resize: bool = Field(True, description="resize to a square of side `size`")
    size: PositiveInt = Field(384, description="side of that square; the Hub's shortest_edge")
    crop_pct: float = Field(224 / 256, gt=0, description="kept part of the edge, if size < 384")
    resample: int = Field(3, ge=0, le=5, description="Pillow's filter; 3 is bicubic")
    do_center_crop: bool = Field(False, description="crop to crop_size after resizing")
    crop_size: tuple[PositiveInt, PositiveInt] | None = Field(None, description="(height, width)")
    do_rescale: bool = Field(True, description="multiply by rescale_factor")
    rescale_factor: float = Field(1 / 255, description="brings 0..255 to 0..1")
    do_normalize: bool = Field(True, description="subtract image_mean, divide by image_std")
    image_mean: Channels = Field((0.5, 0.5, 0.5), description="of red, green, blue")
    image_std: Channels = Field((0.5, 0.5, 0.5), description="of red, green, blue")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.do_center_crop and self.crop_size is None:
            raise ValueError("crop_size: is missing, do_center_crop needs it")
        if self.do_resize and self.size < WARP_FROM and int(self.size / self.crop_pct) < 1:
            raise ValueError(f"crop_pct: {self.crop_pct} is too large for size {self.size}")
        if 0 in self.image_std:
            raise ValueError("image_std: must not be zero, pixels are divided by it")
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a `preprocessor_config.json` of any age; null and missing keys mean the default.

        Raises ValueError, one line that names every key at fault.
        """
        check_processor_type(values)
        own = {key: values[key] for key in cls.model_fields if values.get(key) is not None}
        if not own.get("do_resize", True):
            own.pop("size", None)  # never used then, whatever its form
        if "size" in own:
            own["size"] = read_size(own["size"])
        if "crop_size" in own:
            own["crop_size"] = read_crop_size(own["crop_size"])
        for key in ("image_mean", "image_std"):
            if isinstance(own.get(key), int | float):
                own[key] = (own[key],) * 3
        try:
            return cls.model_validate(own)
        except ValidationError as error:
            raise ValueError(describe_validation_error(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """All settings in the Hub's layout (JSON types only), in one canonical form."""
        values = self.model_dump(mode="json")
        values["size"] = {"shortest_edge": self.size}
        if self.crop_size is not None:
            height, width = self.crop_size
            values["crop_size"] = {"height": height, "width": width}
        return {"image_processor_type": PROCESSOR_TYPES[0], **values}

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of `to_pixels`' result; None where it is each image's own."""
        if self.do_center_crop:
            return self.crop_size
        return (self.size, self.size) if self.do_resize else None

    def to_pixels(self, image: Image.Image) -> Pixels:
        """Resize and crop an RGB image to (height, width, 3) uint8."""
        if image.mode != "RGB":
            raise ValueError(f"image: mode is {image.mode}, it must be RGB; call open_image")
        return self.crop(self.resize(image) if self.do_resize else np.asarray(image))

    def crop(self, pixels: Pixels) -> Pixels:
        """The central `crop_size`, where that is asked for."""
        if self.do_center_crop and self.crop_size is not None:
            return center_crop(pixels, self.crop_size)
        return pixels

    def resize(self, image: Image.Image) -> Pixels:
        """To a square of side `size`: below 384 resized by the short edge and cropped."""
        height, width = self.resized_size(*image.size)
        square = (self.size, self.size)
        if height * width > max(MAX_RESIZED_PIXELS, self.size**2):
            return resize_center(image, (height, width), square, self.resample)
        return center_crop(np.asarray(image.resize((width, height), self.resample)), square)

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) to which an image of this size is resized, before its centre is kept."""
        if self.size >= WARP_FROM:
            return self.size, self.size
        return size_with_short_edge(width, height, int(self.size / self.crop_pct))

    def affine(self) -> tuple["Tensor", "Tensor"]:
        """What `normalize` does as one multiply-add: gain and offset of each channel, float32 (3,)."""
        import torch

        gain_C = torch.full((3,), self.rescale_factor if self.do_rescale else 1.0, dtype=torch.float64)
        offset_C = torch.zeros(3, dtype=torch.float64)
        if self.do_normalize:
            std_C = torch.tensor(self.image_std, dtype=torch.float64)
            gain_C = gain_C / std_C
            offset_C = -torch.tensor(self.image_mean, dtype=torch.float64) / std_C
        return gain_C.float(), offset_C.float()

    def normalize(self, pixels_BHWC: "Tensor", dtype: "torch.dtype | None" = None) -> "Tensor":
        """uint8 pixels to the network's input (B, 3, H, W), computed in float32, cast to `dtype`.

        Runs where the pixels are; `dtype` is float32 unless given.
        """
        import torch

        x_BHWC = pixels_BHWC.to(torch.float32)
        if self.do_rescale:
            x_BHWC = x_BHWC * self.rescale_factor
        if self.do_normalize:
            mean_C = torch.tensor(self.image_mean, dtype=torch.float32, device=x_BHWC.device)
            std_C = torch.tensor(self.image_std, dtype=torch.float32, device=x_BHWC.device)
            x_BHWC = (x_BHWC - mean_C) / std_C
        return x_BHWC.to(dtype or torch.float32).permute(0, 3, 1, 2).contiguous()


def check_processor_type(values: Mapping[str, Any]) -> None:
    for key in ("image_processor_type", "feature_extractor_type"):
        name = values.get(key)
        known = isinstance(name, str) and name.removesuffix("Fast").removesuffix("Pil")
        if name is not None and known not in PROCESSOR_TYPES:
            raise ValueError(f"{key}: {name!r} is not supported, only {PROCESSOR_TYPES[0]} is")


def read_size(size: Any) -> Any:
    """The shortest edge: an integer in old configs, else a dict's shortest_edge."""
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return size["shortest_edge"]
    if isinstance(size, int):
        return size
    raise ValueError(
        f'size: {size!r} has no "shortest_edge", without which ConvNextImageProcessor cannot '
        'resize either; write {"shortest_edge": N} or N'
    )


def read_crop_size(size: Any) -> Any:
    """(height, width): an integer means a square."""
    if isinstance(size, int):
        return (size, size)
    if isinstance(size, Mapping):
        if "height" not in size or "width" not in size:
            raise ValueError(f'crop_size: {size!r} must have "height" and "width"')
        return (size["height"], size["width"])
    return size


def size_with_short_edge(width: int, height: int, short_edge: int) -> tuple[int, int]:
    """(height, width) with this short edge and the image's aspect, rounded down."""
    if width <= height:
        return int(short_edge * height / width), short_edge
    return short_edge, int(short_edge * width / height)


def crop_start(length: int, kept: int) -> int:
    """Where a centred crop begins; negative where the crop is longer and zeros lead."""
    return (length - kept) // 2


def center_crop(pixels_HWC: Pixels, size: tuple[int, int]) -> Pixels:
    """The central (height, width); zeros surround what is smaller."""
    (height, width), channels = size, pixels_HWC.shape[2]
    top, left = (crop_start(n, kept) for n, kept in zip(pixels_HWC.shape[:2], size, strict=True))
    inside = pixels_HWC[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] == size:
        return inside
    cropped = np.zeros((height, width, channels), dtype=np.uint8)
    y, x = max(-top, 0), max(-left, 0)
    cropped[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return cropped


class Span(NamedTuple):
    """One axis of a crop: the source pixels that it needs, and where in these it lies."""

    first: int
    last: int
    begin: float
    end: float
    length: int  # of the result


def span_to_keep(length: int, resized: int, kept: int) -> Span:
    """What the central `kept` of an axis resized from `length` to `resized` is made from."""
    scale = length / resized
    start = max(crop_start(resized, kept), 0)
    stop = min(start + kept, resized)
    margin = math.ceil(WIDEST_FILTER * max(scale, 1.0)) + 1
    first = max(math.floor(start * scale) - margin, 0)
    last = min(math.ceil(stop * scale) + margin, length)
    end = min(stop * scale, length) - first
    return Span(first, last, start * scale - first, end, stop - start)


def resize_center(
    image: Image.Image, resized: tuple[int, int], kept: tuple[int, int], resample: int
) -> Pixels:
    """The central `kept` (height, width) of the image resized to `resized`, and no more.

    Equal to resizing whole and cropping within rounding, as the filters' windows are placed by
    floats; memory is that of the kept part and its source. Columns are made before rows, since
    Pillow may choose either order by size, and the order shows where noise is clipped.
    """
    y, x = map(span_to_keep, image.size[::-1], resized, kept)
    part = image.crop((x.first, y.first, x.last, y.last))
    part = part.resize((x.length, part.height), resample, box=(x.begin, 0, x.end, part.height))
    part = part.resize((x.length, y.length), resample, box=(0, y.begin, x.length, y.end))
    return center_crop(np.asarray(part), kept)
