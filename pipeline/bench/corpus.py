"""What a benchmark of the whole reads: photographs, as they are, in WebDataset tars, and as large JPEGs.

Enters: a folder of the user's, or none. Leaves: encoded images that are known to decode, and files. Knows
neither stages nor time.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from cvt_model.errors import ImageError
from cvt_model.image_file import DEFAULT_MAX_PIXELS, open_image
from pipeline.demo_corpus import PHOTOGRAPH_FILES
from pipeline.errors import ConfigError, InputError

MAX_PHOTOGRAPHS = 96
MAX_PIXELS = 100_000_000  # of all of them, so that large ones do not take minutes to decode again and again
TAR_IMAGES = 60
SMALL = (500, 375)  # as ImageNet's
LARGE = (4000, 3000)  # 12 megapixels, as a telephone's
NUM_LARGE = 4
QUALITY = 90  # of every JPEG made here

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photograph:
    """An encoded image that decodes."""

    suffix: str
    data: bytes


def load_photographs(folder: Path | None) -> list[Photograph]:
    """Up to MAX_PHOTOGRAPHS images of a folder and those below, evenly spaced in order of path.

    Without a folder those that come with scikit-image, as JPEGs of ImageNet's size. Raises ConfigError
    where there is nothing that decodes.
    """
    if folder is None:
        return as_jpegs(list(_within_bounds(_installed())), SMALL)
    return list(_within_bounds(_of_folder(folder)))


def _of_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"--images: {folder} is no folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in Image.registered_extensions()]
    if not found:
        raise ConfigError(f"--images: {folder} holds no file that is an image by its name")
    count = min(len(found), MAX_PHOTOGRAPHS)
    return [found[number * len(found) // count] for number in range(count)]


def _installed() -> list[Path]:
    try:
        data = Path(str(resources.files("skimage"))) / "data"
    except ModuleNotFoundError as error:
        raise InputError(
            "give --images FOLDER; without it the photographs of scikit-image are taken: "
            "pip install 'cvt-pipeline[demo]'"
        ) from error
    return [data / file for file in PHOTOGRAPH_FILES]


def _within_bounds(paths: Sequence[Path]) -> Iterator[Photograph]:
    pixels = 0
    for path in paths:
        try:
            data = path.read_bytes()
            image = open_image(data, DEFAULT_MAX_PIXELS)
        except (ImageError, OSError) as error:
            logger.warning("--images: left out %s: %s", path, error)
            continue
        yield Photograph(path.suffix.lower(), data)
        pixels += image.width * image.height
        if pixels > MAX_PIXELS:
            return
    if not pixels:
        raise ConfigError(f"--images: no image of {len(paths)} can be decoded")


def as_jpegs(photographs: Sequence[Photograph], size: tuple[int, int]) -> list[Photograph]:
    """Copies as JPEGs of `size`: the long side, then the short one."""
    return [Photograph(".jpg", _jpeg(photograph.data, size)) for photograph in photographs]


def _jpeg(data: bytes, size: tuple[int, int]) -> bytes:
    image = open_image(data, DEFAULT_MAX_PIXELS).image_rgb
    upright = image.height > image.width
    buffer = io.BytesIO()
    resized = image.resize(size[::-1] if upright else size, Image.Resampling.BICUBIC)
    resized.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_tars(folder: Path, photographs: Sequence[Photograph], num_images: int) -> list[Path]:
    """`num_images` samples in tars of TAR_IMAGES: the photographs in turn, again and again.

    A tar with the content of an earlier one is a hard link to it: another shard to read, no more disk.
    """
    folder.mkdir(parents=True)
    tars: list[Path] = []
    made: dict[tuple[int, int], Path] = {}
    for first in range(0, num_images, TAR_IMAGES):
        count = min(TAR_IMAGES, num_images - first)
        content = (first % len(photographs), count)
        tar = folder / f"{len(tars):06d}.tar"
        if content in made:
            os.link(made[content], tar)
        else:
            samples = [photographs[(first + number) % len(photographs)] for number in range(count)]
            made[content] = _write_tar(tar, samples)
        tars.append(tar)
    return tars


def _write_tar(path: Path, samples: Sequence[Photograph]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples):
            info = tarfile.TarInfo(f"{number:04d}{sample.suffix}")
            info.size = len(sample.data)
            tar.addfile(info, io.BytesIO(sample.data))
    return path


def write_files(folder: Path, photographs: Sequence[Photograph]) -> list[Path]:
    """Each photograph as a file."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:04d}{photo.suffix}" for number, photo in enumerate(photographs)]
    for path, photo in zip(paths, photographs, strict=True):
        path.write_bytes(photo.data)
    return paths
