"""The demo's corpus: WebDataset shards made offline from the photographs in scikit-image's wheel.

In: a folder and a seed. Out: `demo-000000.tar`… in that folder. Each photograph comes in variants
(crops, scales, small rotations, re-encodings) that are near duplicates of one another, and a few
broken files stand among them. Knows nothing of the model, the config or the run that reads it.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.errors import InputError

# The files that are photographs, one of each scene: no drawings, no silhouette, no stereo twin.
PHOTOGRAPH_FILES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "microaneurysms.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
PHOTOGRAPHS = tuple(file.partition(".")[0] for file in PHOTOGRAPH_FILES)

MAX_SIDE = 512
BROKEN = "broken"


@dataclass(frozen=True)
class DemoCorpus:
    """What `make_corpus` wrote; `num_images` counts the images that decode."""

    folder: Path
    num_images: int
    num_broken: int
    photographs: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """How a variant is made: turn, crop, scale, convert, encode. The default is the original."""

    extension: str = "png"
    quality: int | None = None
    min_area: float = 1.0  # the crop keeps a share of the area drawn from [min_area, 1]
    max_degrees: float = 0.0  # turned by up to so much, the empty corners cropped away
    min_scale: float = 1.0  # scaled by a factor drawn from [min_scale, 1]
    rgb: bool = False


# A turn of 4 degrees costs the widest photograph 30 % of its area, one of 3 degrees 24 %: with the
# crops that go with them, every variant keeps 70 % of its photograph.
VARIANTS = (
    Variant(),
    Variant("jpg", 30),
    Variant("jpg", 50),
    Variant("jpg", 75),
    Variant("jpg", 95),
    Variant("webp", 60),
    Variant("webp", 90),
    Variant("gif"),
    Variant("bmp", rgb=True),
    Variant("tif"),
    Variant("jpg", 85, rgb=True),
    Variant("png", min_area=0.7),
    Variant("jpg", 90, min_area=0.7),
    Variant("jpg", 60, min_area=0.7),
    Variant("webp", 80, min_area=0.8),
    Variant("jpg", 92, min_scale=0.5),
    Variant("png", min_scale=0.4),
    Variant("bmp", min_scale=0.4),
    Variant("jpg", 92, max_degrees=4),
    Variant("png", max_degrees=4),
    Variant("webp", 75, max_degrees=2),
    Variant("jpg", 70, min_area=0.75, min_scale=0.5),
    Variant("gif", min_area=0.8, min_scale=0.5),
    Variant("tif", max_degrees=3, min_scale=0.4),
    Variant("jpg", 40, min_area=0.93, max_degrees=3),
    Variant("jpg", 80, min_area=0.93, max_degrees=3, min_scale=0.5, rgb=True),
    Variant("webp", 50, min_area=0.93, max_degrees=3, min_scale=0.5),
)


@dataclass(frozen=True)
class Sample:
    """One sample of a shard, its image encoded."""

    key: str
    extension: str
    image: bytes
    photograph: str | None
    variant: str


def make_corpus(folder: Path, *, num_shards: int = 8, seed: int = 0) -> DemoCorpus:
    """Write the demo's shards into `folder`; the same seed writes the same bytes.

    Every image sample `<photograph>-<number>` has a `.json` member that names its photograph and
    tells how the variant was made. Raises InputError with the remedy where scikit-image is not
    installed, and ValueError for fewer than one shard.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}; a corpus has at least one shard")
    photographs = _load_photographs()
    images = [sample for name, photo in photographs.items() for sample in _vary(name, photo, seed)]
    broken = list(_broken_samples(images, seed))
    rng = random.Random(f"{seed}/order")
    rng.shuffle(images)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        samples = images[shard::num_shards]
        for sample in broken[shard::num_shards]:
            samples.insert(rng.randint(0, len(samples)), sample)
        _write_shard(folder / f"demo-{shard:06d}.tar", samples)
    return DemoCorpus(folder, len(images), len(broken), tuple(photographs))


def photograph_of(image_id: str) -> str:
    """Return the photograph that an image id such as `demo-000003.tar#chelsea-07` shows.

    Raises ValueError where the id names no variant of a photograph.
    """
    match = re.fullmatch(r".*#([a-z_]+)-\d+", image_id)
    if match is None or match[1] not in PHOTOGRAPHS:
        raise ValueError(f"{image_id!r} is not an image of the demo's corpus")
    return match[1]


def _load_photographs() -> dict[str, Image.Image]:
    """Open the photographs in the installed package, none more than MAX_SIDE pixels wide or high.

    The files are read as they lie: scikit-image's own loaders would download what is missing.
    """
    try:
        data = resources.files("skimage") / "data"
    except ModuleNotFoundError as error:
        raise InputError(
            "the demo's photographs come with scikit-image: pip install 'cvt-pipeline[demo]'"
        ) from error
    photographs: dict[str, Image.Image] = {}
    for name, file in zip(PHOTOGRAPHS, PHOTOGRAPH_FILES, strict=True):
        photo = Image.open(io.BytesIO((data / file).read_bytes()))
        photo.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        photographs[name] = photo
    return photographs


def _vary(name: str, photo: Image.Image, seed: int) -> Iterator[Sample]:
    rng = random.Random(f"{seed}/{name}")
    for number, variant in enumerate(VARIANTS):
        image, steps = _transform(photo, variant, rng)
        steps.append(
            variant.extension
            if variant.quality is None
            else f"{variant.extension} quality {variant.quality}"
        )
        yield Sample(
            key=f"{name}-{number:02d}",
            extension=variant.extension,
            image=_encode(image, variant.extension, variant.quality),
            photograph=name,
            variant=", ".join(steps) if variant != Variant() else "original",
        )


def _transform(image: Image.Image, variant: Variant, rng: random.Random) -> tuple[Image.Image, list[str]]:
    """Return the variant's pixels, and the steps that led to them in words."""
    steps = []
    if variant.max_degrees:
        degrees = rng.choice((-1, 1)) * rng.uniform(1, variant.max_degrees)
        image = _rotate(image, degrees)
        steps.append(f"turned {degrees:+.1f} degrees")
    if variant.min_area < 1:
        area = rng.uniform(variant.min_area, 1)
        image = _crop(image, math.sqrt(area), rng.random(), rng.random())
        steps.append(f"cropped to {area:.0%}")
    if variant.min_scale < 1:
        scale = rng.uniform(variant.min_scale, 1)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        steps.append(f"scaled to {scale:.0%}")
    if variant.rgb and image.mode != "RGB":
        image = image.convert("RGB")
        steps.append("gray as RGB")
    return image, steps


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Turn the image and crop it to the largest centred box of its shape without empty corners."""
    turn = math.radians(abs(degrees))
    aspect = max(image.size) / min(image.size)
    side = 1 / (math.cos(turn) + aspect * math.sin(turn))
    side -= 2 / min(image.size)  # resampling darkens the pixel at the edge
    return _crop(image.rotate(degrees, Image.Resampling.BICUBIC), side, 0.5, 0.5)


def _crop(image: Image.Image, side: float, left: float, top: float) -> Image.Image:
    """Crop to `side` times width and height; `left` and `top` are 0 to 1 of the room there is."""
    width, height = math.ceil(image.width * side), math.ceil(image.height * side)
    x, y = round(left * (image.width - width)), round(top * (image.height - height))
    return image.crop((x, y, x + width, y + height))


def _encode(image: Image.Image, extension: str, quality: int | None) -> bytes:
    options: dict[str, Any] = {}
    if extension == "png":
        options = {"compress_level": 1}
    elif extension == "tif":
        options = {"compression": "tiff_lzw"}
    elif extension == "webp":
        options = {"quality": quality, "method": 2}
    elif quality is not None:
        options = {"quality": quality}
    elif extension == "gif" and image.mode == "RGB":
        image = image.quantize(method=Image.Quantize.FASTOCTREE)
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[f".{extension}"], **options)
    return buffer.getvalue()


def _broken_samples(images: list[Sample], seed: int) -> Iterator[Sample]:
    """Yield files that no decoder can read, as corpora have them."""
    rng = random.Random(f"{seed}/{BROKEN}")
    jpeg = next(sample.image for sample in images if sample.extension == "jpg")
    png = next(sample.image for sample in images if sample.extension == "png")
    middle = len(png) // 2  # of the only large thing in the file, the compressed pixels
    files = (
        ("jpg", b"", "no bytes"),
        ("jpg", jpeg[: len(jpeg) // 2], "truncated JPEG"),
        ("jpg", rng.randbytes(4096), "random bytes"),
        ("png", b"This was to be a photograph.\n", "text"),
        ("png", png[:middle] + b"\xff" * 64 + png[middle + 64 :], "PNG with damaged pixel data"),
        ("webp", b"<html><title>404 Not Found</title></html>\n", "error page"),
    )
    for number, (extension, image, fault) in enumerate(files):
        yield Sample(f"{BROKEN}-{number:02d}", extension, image, None, fault)


def _write_shard(path: Path, samples: list[Sample]) -> None:
    """Write a tar of `<key>.<extension>` and `<key>.json` pairs; equal samples give equal bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            metadata = {"photograph": sample.photograph, "variant": sample.variant}
            members = {sample.extension: sample.image, "json": json.dumps(metadata).encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")  # times and owners are 0
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
