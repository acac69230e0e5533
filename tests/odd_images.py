"""Odd and malformed image files: the material of the promise that no input kills the run.

A folder enters; more than 1,000 small files leave, in one subfolder a group, with what is known
of each: whether it must decode, must be rejected, or may do either. The expectations were measured
with Pillow 13 at its default limit of 178,956,970 pixels; where they could depend on a codec's
version or on luck, they are None. This module knows Pillow and the file formats, and nothing of
the pipeline.

Every group is a function from a seed to its files. Equal seeds give equal bytes.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, PngImagePlugin

SIZE = (48, 32)
FLIPPED_HEADERS = 10  # fuzzed files a kind, of each sort
FLIPPED_BODIES = 10
HEADER_BYTES = 64
LIMIT = 178_956_970  # pixels, Pillow's own
BOMB_BYTES = 100 * 2**20


@dataclass(frozen=True)
class OddImage:
    """A written file: its posix path in the folder, and what must become of it (None: unknown)."""

    path: str
    good: bool | None
    reason: str | None


@dataclass(frozen=True)
class File:
    """A file to write, in its group's subfolder."""

    name: str
    data: bytes
    good: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Kind:
    """A way to save images: a format with one set of options, and the modes that it stores.

    The first mode is the one that is cut and damaged. `sure_cuts` are the cuts (of `_cut`) after
    which the file cannot be decoded.
    """

    name: str
    format: str
    extension: str
    modes: str
    sure_cuts: str = "10 50 90 last"
    options: tuple[tuple[str, Any], ...] = ()
    readable: bool | None = True
    num_frames: int = 1


def write_odd_images(folder: Path, *, seed: int = 0) -> list[OddImage]:
    """Write the files under `folder`, and return them in the order of their paths.

    Two subfolders, "names/empty" and "names/empty.jpg", hold no file. The seed changes only the
    random damage: the paths and what is expected of them stay the same.
    """
    Image.init()
    written: dict[str, OddImage] = {}
    for group, make in _GROUPS.items():
        for file in make(seed):
            relative = f"{group}/{file.name}"
            assert relative not in written, relative
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data)
            written[relative] = OddImage(relative, file.good, file.reason)
    for name in ("empty", "empty.jpg"):
        (folder / "names" / name).mkdir(parents=True, exist_ok=True)
    return [written[path] for path in sorted(written)]


# Every format, in every mode.

_TIFF_MODES = "RGB 1 L LA P PA RGBA RGBX CMYK YCbCr LAB I I;16 I;16B F"
_WEBP_MODES = "RGBA 1 L LA P PA RGB RGBX CMYK YCbCr LAB HSV I I;16 F"
# Without zstd in its libtiff, as in Pillow 11.3, the failed saving corrupts the process's memory.
_ZSTD = ("zstd",) if int(PIL.__version__.split(".")[0]) >= 13 else ()

KINDS = (
    Kind("avif", "AVIF", "avif", _WEBP_MODES, options=(("max_threads", 1), ("speed", 10))),
    Kind("blp", "BLP", "blp", "P"),
    Kind("bmp", "BMP", "bmp", "RGB 1 L P RGBA"),
    Kind("dds", "DDS", "dds", "RGBA L LA RGB", sure_cuts=""),  # Pillow 11 fills the rest
    Kind("dds_dxt1", "DDS", "dds", "RGBA", options=(("pixel_format", "DXT1"),)),
    Kind("dds_dxt5", "DDS", "dds", "RGBA", options=(("pixel_format", "DXT5"),)),
    Kind("dib", "DIB", "dib", "RGB 1 L P RGBA"),
    Kind("eps", "EPS", "eps", "RGB L CMYK", readable=None),  # needs Ghostscript
    Kind("gif", "GIF", "gif", "P 1 L LA RGB RGBA I I;16 F", sure_cuts="10 50 90"),
    Kind("gif_frames", "GIF", "gif", "P L RGB RGBA", num_frames=3, sure_cuts="10"),
    Kind("icns", "ICNS", "icns", "RGBA 1 L LA P RGB I;16", sure_cuts="10 50 90"),
    Kind("ico", "ICO", "ico", "RGBA 1 L LA P RGB I;16", sure_cuts="10 50 90"),
    Kind("ico_bmp", "ICO", "ico", "RGBA P RGB", options=(("bitmap_format", "bmp"),)),
    Kind("im", "IM", "im", "RGB 1 L LA P PA RGBA RGBX CMYK YCbCr I I;16 I;16B F"),
    Kind("jpeg", "JPEG", "jpg", "RGB 1 L RGBX CMYK YCbCr"),
    Kind("jpeg_progressive", "JPEG", "jpg", "RGB L CMYK", options=(("progressive", True),)),
    Kind("jpeg_444", "JPEG", "jpg", "RGB", options=(("subsampling", 0), ("quality", 100))),
    Kind("jpeg_restart", "JPEG", "jpg", "RGB L", options=(("restart_marker_blocks", 1),)),
    Kind("jpeg_rgb", "JPEG", "jpg", "RGB", options=(("keep_rgb", True),)),
    Kind("jp2", "JPEG2000", "jp2", "RGB L LA RGBA CMYK YCbCr I;16"),
    Kind("j2k", "JPEG2000", "j2k", "RGB L RGBA", options=(("no_jp2", True),)),
    Kind("mpo", "MPO", "mpo", "RGB 1 L RGBX CMYK YCbCr", num_frames=2, sure_cuts="10 50"),
    Kind("msp", "MSP", "msp", "1"),
    Kind("palm", "PALM", "palm", "P 1", readable=False),
    Kind("pcx", "PCX", "pcx", "RGB 1 L P"),
    Kind("pdf", "PDF", "pdf", "RGB 1 L LA P RGBA CMYK", readable=False),
    Kind("png", "PNG", "png", "RGBA 1 L LA P RGB I;16", sure_cuts="10 50 90"),
    Kind("apng", "PNG", "png", "RGBA L P RGB", num_frames=3, sure_cuts="10"),
    Kind("pnm", "PPM", "ppm", "RGB 1 L RGBA I I;16 F"),
    Kind("qoi", "QOI", "qoi", "RGBA RGB", sure_cuts="10 50 90"),
    Kind("sgi", "SGI", "sgi", "RGB L RGBA"),
    Kind("spider", "SPIDER", "spider", "F 1 L P RGB I"),
    Kind("tga", "TGA", "tga", "RGB 1 L LA P RGBA", sure_cuts="10 50 90"),
    Kind(
        "tga_rle",
        "TGA",
        "tga",
        "RGB L LA P RGBA",
        options=(("compression", "tga_rle"),),
        sure_cuts="10 50 90",
    ),
    Kind("tiff", "TIFF", "tif", _TIFF_MODES),
    *(
        Kind(f"tiff_{name}", "TIFF", "tif", _TIFF_MODES, options=(("compression", name),))
        for name in ("packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", *_ZSTD)
    ),
    *(
        Kind(
            f"tiff_{name}",
            "TIFF",
            "tif",
            "RGB L LA RGBA RGBX CMYK YCbCr LAB",
            options=(("compression", name),),
        )
        for name in ("jpeg", "tiff_jpeg")
    ),
    *(
        Kind(f"tiff_{name}", "TIFF", "tif", "1", "10 50 90", (("compression", name),))
        for name in ("group3", "group4", "tiff_raw_16", "tiff_ccitt")
    ),
    Kind("tiff_frames", "TIFF", "tif", "RGB 1 L", num_frames=3, sure_cuts="10"),
    Kind("webp", "WEBP", "webp", _WEBP_MODES),
    Kind("webp_lossless", "WEBP", "webp", _WEBP_MODES, options=(("lossless", True),)),
    Kind("webp_frames", "WEBP", "webp", "RGBA RGB L", num_frames=3),
    Kind("xbm", "XBM", "xbm", "1", sure_cuts="10 50 90"),
)


def _saved(kind: Kind) -> bool:
    return kind.format in Image.SAVE


@cache
def _picture(mode: str, size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Return coloured noise on a smooth ground, half transparent where the mode has alpha."""
    rng = random.Random(seed)
    ground = Image.frombytes("RGB", (4, 3), rng.randbytes(36)).resize(size)
    noise = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    rgb = Image.blend(ground, noise, 0.1)
    if mode in ("LA", "PA", "RGBA"):
        rgba = rgb.convert("RGBA")
        rgba.putalpha(Image.linear_gradient("L").resize(size))
        return rgba.convert("P").convert("PA") if mode == "PA" else rgba.convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", size, rgb.tobytes())
    if mode.startswith("I;16"):
        return rgb.convert("I").point(lambda value: value * 256).convert(mode)
    return rgb.convert(mode)


def _encode(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, format_, **options)  # saving leaves marks on the image
    return buffer.getvalue()


@cache
def _save(kind: Kind, mode: str) -> bytes:
    options = dict(kind.options)
    if kind.format == "PDF":  # would hold the time of day
        options |= {"creationDate": time.gmtime(0), "modDate": time.gmtime(0)}
    if kind.num_frames > 1:
        more = [_picture(mode, seed=number).copy() for number in range(1, kind.num_frames)]
        options |= {"save_all": True, "append_images": more}
    data = _encode(_picture(mode), kind.format, **options)
    return _small_icons(data) if kind.format == "ICNS" else data


def _small_icons(data: bytes) -> bytes:
    """Return the ICNS without its table of contents and its large icons, a megabyte of them."""
    kept, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at + 4 : at + 8])
        kept += data[at : at + length] if 500 < length < 20_000 else b""
        at += length
    return _block(b"icns", kept)


def _block(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack(">I", 8 + len(data)) + data


def _modes(seed: int) -> Iterator[File]:
    for kind in filter(_saved, KINDS):
        for mode in kind.modes.split():
            name = f"{kind.name}-{mode.replace(';', '_')}.{kind.extension}"
            fails = (kind.name, mode) == ("tiff", "YCbCr")  # in Pillow 11
            yield File(name, _save(kind, mode), None if fails else kind.readable)


# The same files, damaged.


def _cut(data: bytes, cut: str) -> bytes:
    if cut == "byte":
        return data[:1]
    return data[:-1] if cut == "last" else data[: len(data) * int(cut) // 100]


def _truncated(seed: int) -> Iterator[File]:
    for kind in filter(_saved, KINDS):
        data = _save(kind, kind.modes.split()[0])
        yield File(f"{kind.name}-byte.{kind.extension}", data[:1], False)
        for cut in ("10", "50", "90", "last"):
            sure = cut in kind.sure_cuts.split() or kind.readable is False
            known = cut == "50" and kind.name in ("jpeg", "jpeg_444", "jpeg_restart", "png")
            yield File(
                f"{kind.name}-{cut}.{kind.extension}",
                _cut(data, cut),
                False if sure else None,
                "truncated" if known else None,
            )


def _flip(data: bytes, rng: random.Random, num_bytes: int, end: int) -> bytes:
    damaged = bytearray(data)
    for _ in range(num_bytes):
        damaged[rng.randrange(min(end, len(data)))] ^= rng.randrange(1, 256)
    return bytes(damaged)


def _fuzzed(seed: int) -> Iterator[File]:
    for kind in filter(_saved, KINDS):
        data = _save(kind, kind.modes.split()[0])
        rng = random.Random(f"{seed}/{kind.name}")
        for number in range(FLIPPED_HEADERS):
            header = _flip(data, rng, rng.randint(1, 4), HEADER_BYTES)
            yield File(f"{kind.name}-header{number:02d}.{kind.extension}", header)
        for number in range(FLIPPED_BODIES):
            body = _flip(data, rng, rng.choice((1, 4, 16, 64)), len(data))
            yield File(f"{kind.name}-body{number:02d}.{kind.extension}", body)
        start, end = sorted(rng.sample(range(len(data)), 2))
        yield File(f"{kind.name}-hole.{kind.extension}", data[:start] + data[end:])
        yield File(f"{kind.name}-twice.{kind.extension}", data[:end] + data[start:])
        zeros = data[:start] + bytes(end - start) + data[end:]
        yield File(f"{kind.name}-zeros.{kind.extension}", zeros)


def _trailing(seed: int) -> Iterator[File]:
    """Yield good files with something after or before them."""
    rng = random.Random(f"{seed}/trailing")
    for kind in filter(_saved, KINDS):
        data = _save(kind, kind.modes.split()[0])
        sure = kind.readable if kind.name in ("bmp", "gif", "jpeg", "png", "qoi", "webp") else None
        for name, more in (("garbage", rng.randbytes(999)), ("zeros", bytes(999)), ("self", data)):
            yield File(f"{kind.name}-{name}.{kind.extension}", data + more, sure)
        yield File(f"{kind.name}-late.{kind.extension}", b"\r\n" + data)


# Files that are no images, or do not say which.


def _jpeg(mode: str = "RGB", size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    return _encode(_picture(mode, size), "JPEG", **options)


def _png(mode: str = "RGB", size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    return _encode(_picture(mode, size), "PNG", **options)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("photo.jpg"), _jpeg())
    return buffer.getvalue()


def _box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data


_HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body></body></html>\n"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>\n'
_OTHERS: dict[str, bytes | Callable[[], bytes]] = {
    "text.txt": b"This was to be a photograph.\n",
    "page.html": _HTML,
    "data.json": b'{"error": "not found", "status": 404}\n',
    "table.csv": b"url,caption\na.jpg,a cat\n",
    "feed.xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>\n',
    "utf16.txt": "This was to be a photograph.\n".encode("utf-16"),
    "base64.txt": b"data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ\n",
    "pointer.lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "archive.zip": _zip,
    "page.gz": lambda: gzip.compress(_HTML, mtime=0),
    "base.sqlite": b"SQLite format 3\0" + struct.pack(">H", 4096) + bytes(4078),
    "film.mp4": _box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41") + _box(b"mdat", bytes(99)),
    "film.webm": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm" + bytes(99),
    "program.elf": b"\x7fELF\2\1\1" + bytes(99),
    "sound.wav": b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0" + bytes(24),
    "table.parquet": b"PAR1" + bytes(99) + b"PAR1",
}
_UNSUPPORTED = {  # images that Pillow does not read: the pipeline may name them either way
    "photo.heic": _box(b"ftyp", b"heic\0\0\0\0mif1heic") + _box(b"mdat", bytes(99)),
    "code.jxl": b"\xff\x0a" + bytes(99),
    "box.jxl": _box(b"JXL ", b"\r\n\x87\n") + _box(b"ftyp", b"jxl \0\0\0\0jxl "),
    "drawing.svg": _SVG,
    "drawing.wmf": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hHIH", 0, 0, 9, 9, 96, 0, 0) + bytes(99),
    "weather.grib": b"GRIB\0\0\0\1" + bytes(99),
    "weather.bufr": b"BUFR" + bytes(99),
    "data.h5": b"\x89HDF\r\n\x1a\n" + bytes(99),
}


def _not_images(seed: int) -> Iterator[File]:
    for name, other in _OTHERS.items():
        data = other if isinstance(other, bytes) else other()
        stem, extension = name.rsplit(".", 1)
        yield File(name, data, False, "not_an_image")
        for pretended in ("jpg", "png", "webp"):
            pretender = f"{stem}_{extension}.{pretended}"
            yield File(pretender, data, False, "not_an_image")
    for name, data in _UNSUPPORTED.items():
        yield File(name, data, False)
        yield File(f"{name}.jpg", data, False)


def _blank(seed: int) -> Iterator[File]:
    for extension in ("jpg", "png", "webp", "gif", "bmp", "tif", "avif", "tga", "txt"):
        yield File(f"empty.{extension}", b"", False, "empty")
        for name, data in (("zero", b"\0"), ("ff", b"\xff"), ("newline", b"\n")):
            yield File(f"one_{name}.{extension}", data, False, "not_an_image")
        for num_bytes in (2, 512, 65536):
            for name, data in (("zeros", b"\0"), ("ffs", b"\xff"), ("spaces", b" ")):
                yield File(f"{name}_{num_bytes}.{extension}", data * num_bytes, False)
    yield File("empty", b"", False, "empty")


_MAGICS = {
    "avif": _box(b"ftyp", b"avif\0\0\0\0avifmif1"),
    "blp1": b"BLP1",
    "blp2": b"BLP2",
    "bmp": b"BM",
    "cur": b"\0\0\2\0\1\0",
    "dcx": b"\xb1\x68\xde\x3a",
    "dds": b"DDS \x7c\0\0\0",
    "fits": b"SIMPLE  =                    T",
    "fli": b"\0\0\0\0\x11\xaf",
    "ftex": b"FTEX",
    "gbr": b"\0\0\0\x1c\0\0\0\2",
    "gif87": b"GIF87a",
    "gif89": b"GIF89a",
    "icns": b"icns",
    "ico": b"\0\0\1\0\1\0",
    "im": b"Image type: RGB\r\n",
    "iptc": b"\x1c\2\0",
    "j2k": b"\xff\x4f\xff\x51\0",
    "jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
    "jpeg": b"\xff\xd8\xff\xe0",
    "mcidas": b"\0\0\0\0\0\0\0\4",
    "mpeg": b"\0\0\1\xb3",
    "msp1": b"DanM",
    "msp2": b"LinS",
    "ole": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "pcx": b"\x0a\5\1\x08",
    "pixar": b"\x80\xe8\0\0",
    "png": b"\x89PNG\r\n\x1a\n",
    "pbm": b"P4 ",
    "pgm": b"P2 ",
    "pfm": b"Pf\n",
    "psd": b"8BPS\0\1",
    "qoi": b"qoif",
    "riff": b"RIFF\xff\0\0\0WEBPVP8 ",
    "rifx": b"RIFF\xff\0\0\0WEBPVP8X",
    "sgi": b"\x01\xda\1\1",
    "sun": b"\x59\xa6\x6a\x95",
    "tiff_le": b"II\x2a\0\x08\0\0\0",
    "tiff_be": b"MM\0\x2a\0\0\0\x08",
    "bigtiff": b"II\x2b\0\x08\0\0\0\x10\0\0\0\0\0\0\0",
    "xbm": b"#define a_width 9\n",
    "xpm": b"/* XPM */\n",
    "xv": b"P7 332\n",
}


def _only_magic(seed: int) -> Iterator[File]:
    """Yield files that start as an image and go on with nonsense."""
    for name, magic in _MAGICS.items():
        rng = random.Random(f"{seed}/{name}")
        rests = {
            "alone": b"",
            "zeros": bytes(999),
            "ffs": b"\xff" * 999,
            "random": rng.randbytes(999),
        }
        for rest, data in rests.items():
            yield File(f"{name}-{rest}.{name}", magic + data)


_NAMES = (
    "no_extension same.jpg same.png same same.jpeg UPPER.JPG Mixed.JpEg upper.PNG double.tar.jpg "
    "double.jpg.png double.png.jpg image.txt image.json image.bin image.jpg_ .hidden.jpg .jpg "
    ".hidden_folder/inner.png folder.jpg/inner.png _underscore.png ..two_dots.png three...png "
    "percent%.png percent%20.png percent%2F.png percent%00.png percent%s.png hash#1.png "
    "query?w=1&h=2.png star*.png double**star.png brackets[x].png brackets[0-9].png "
    "braces{a,b}.png braces{}.png quote'.png quote\".png backtick`.png $HOME.png $(true).png "
    "semi;colon.png pipe|.png less<greater>.png back\\slash.png colon:name.png s3:key.png "
    "C:drive.png at@2x.png plus+plus.png equals=1.png year=2024/part.png ~tilde.png -dash.png "
    "--help.png !bang.png comma,comma.png caret^.png NaN null true 1 1e5.png 007.png "
    "grüße.png été.jpg 画像.png изображение.png صورة.png ภาพ.png 😀.png 👩‍👩‍👧‍👦.jpg "
    "ﬁ.png İ.png ß.png"
)
_SPACED_NAMES = (
    "a space.png",
    " leading.png",
    "trailing.png ",
    "trailing dot.png.",
    "tab\there.png",
    "no\u00a0break.png",
    "zero\u200bwidth.png",
    "right\u202eto_left.png",
    "decomposed e\u0301.png",
    "bell\x07.png",
    "escape\x1b[31m.png",
    "line\u2028separator.png",
)


def _names(seed: int) -> Iterator[File]:
    jpeg, png = _jpeg(), _png()
    long_names = ("x" * 200 + ".jpg", "y" * 251 + ".png", "é" * 125 + ".png", "z" * 200)
    nested = ("d/" * 30 + "deep.png", ("long" * 50 + "/") * 4 + "deep.jpg")
    for name in (*_NAMES.split(" "), *_SPACED_NAMES, *long_names, *nested):
        yield File(name, png if name.strip(" .").endswith("png") else jpeg, True)


def _wrong_extensions(seed: int) -> Iterator[File]:
    names = ("avif", "bmp", "gif", "jpeg", "jp2", "png", "pnm", "tiff", "webp")
    for kind in KINDS:
        if kind.name in names and _saved(kind):
            data = _save(kind, kind.modes.split()[0])
            for extension in ("jpg", "png", "webp", "tga", "eps"):
                if extension != kind.extension:
                    yield File(f"{kind.name}_as.{extension}", data, True)


# Sizes, honest and not.


def _chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    check = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_IEND = _chunk(b"IEND", b"")


def _ihdr(width: int, height: int, depth: int, color: int, interlace: int = 0) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))


def _raw_png(width: int, height: int, depth: int, color: int, *chunks: bytes) -> bytes:
    """Return a PNG of these chunks; without any, one with a little image data."""
    body = b"".join(chunks) or _chunk(b"IDAT", zlib.compress(bytes(99)))
    return _PNG_MAGIC + _ihdr(width, height, depth, color) + body + _IEND


def _raw_gif(width: int, height: int, *blocks: bytes, palette: bool = True) -> bytes:
    table = bytes(range(12)) if palette else b""
    screen = struct.pack("<HHBBB", width, height, 0x91 if palette else 0, 0, 0)
    return b"GIF89a" + screen + table + b"".join(blocks) + b"\x3b"


def _gif_frame(x: int, y: int, width: int, height: int, *, palette: bool = False) -> bytes:
    """Return a frame whose data ends after its first four pixels."""
    table = bytes(range(12)) if palette else b""
    head = b"\x2c" + struct.pack("<HHHHB", x, y, width, height, 0x81 if palette else 0)
    # Codes, lowest bits first: clear (4), 1, 1, 1 of 3 bits; 1, end (5) of 4 bits.
    return head + table + b"\x02\x03\x4c\x12\x05\x00"


def _raw_bmp(width: int, height: int, bits: int, compression: int, data: bytes) -> bytes:
    palette = bytes(range(4 << bits)) if bits < 8 else bytes(4 << bits) if bits == 8 else b""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    offset = 14 + len(info) + len(palette)
    head = b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
    return head + info + palette + data


_Tags = dict[int, tuple[int, int, int]]  # tag: type, count, value or offset


def _raw_tiff(
    width: int = 8,
    height: int = 8,
    tags: _Tags | None = None,
    *,
    drop: Iterable[int] = (),
    num_tags: int | None = None,
    next_ifd: int = 0,
    data: bytes = bytes(range(192)),
) -> bytes:
    """Return a little-endian gray TIFF of one strip, with the given tags added or replaced."""
    all_tags: _Tags = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 0),
        277: (3, 1, 1),
        278: (4, 1, height),
        279: (4, 1, width * height % 2**32),
    }
    all_tags |= tags or {}
    kept = {tag: entry for tag, entry in sorted(all_tags.items()) if tag not in drop}
    offset = 8 + 2 + 12 * len(kept) + 4
    if 273 in kept and not (tags and 273 in tags):
        kept[273] = (4, 1, offset)
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in kept.items())
    count = struct.pack("<H", len(kept) if num_tags is None else num_tags)
    return b"II*\0\x08\0\0\0" + count + entries + struct.pack("<I", next_ifd) + data


def _raw_webp(width: int, height: int) -> bytes:
    """Return a WebP whose extended header claims a canvas for its small image."""
    inner = _encode(_picture("RGB"), "WEBP")[12:]
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunks = b"VP8X" + struct.pack("<II", 10, 0) + sides + inner
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _resized_jpeg(width: int, height: int) -> bytes:
    data = bytearray(_jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _raw_psd(width: int, height: int, data: bytes) -> bytes:
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3)
    return head + bytes(12) + b"\0\0" + data


def _raw_tga(width: int, height: int) -> bytes:
    return struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 24, 0) + bytes(99)


def _raw_pcx(width: int, height: int) -> bytes:
    corners = struct.pack("<HHHH", 0, 0, (width - 1) % 2**16, (height - 1) % 2**16)
    return b"\x0a\5\1\x08" + corners + bytes(53) + b"\1" + struct.pack("<H", width) + bytes(99)


def _raw_qoi(width: int, height: int) -> bytes:
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + bytes(99)


def _raw_dds(width: int, height: int) -> bytes:
    data = bytearray(_encode(_picture("RGB"), "DDS"))
    data[12:20] = struct.pack("<II", height, width)
    return bytes(data)


def _raw_sgi(width: int, height: int) -> bytes:
    return b"\x01\xda\0\1" + struct.pack(">HHHH", 3, width, height, 3) + bytes(500)


def _raw_ppm(width: int, height: int) -> bytes:
    return b"P6\n%d %d\n255\n" % (width, height) + bytes(99)


def _raw_jp2(width: int, height: int) -> bytes:
    data = bytearray(_encode(_picture("RGB"), "JPEG2000", no_jp2=True))
    data[8:16] = struct.pack(">II", width, height)  # the SIZ marker's
    data[24:32] = data[8:16]  # one tile
    return bytes(data)


_CLAIMS: dict[str, Callable[[int, int], bytes]] = {
    "png": lambda width, height: _raw_png(width, height, 8, 2),
    "gif": lambda width, height: _raw_gif(width, height, _gif_frame(0, 0, width, height)),
    "bmp": lambda width, height: _raw_bmp(width, height, 24, 0, bytes(99)),
    "tif": _raw_tiff,
    "jpg": _resized_jpeg,
    "webp": _raw_webp,
    "psd": lambda width, height: _raw_psd(width, height, bytes(99)),
    "tga": _raw_tga,
    "pcx": _raw_pcx,
    "qoi": _raw_qoi,
    "dds": _raw_dds,
    "sgi": _raw_sgi,
    "ppm": _raw_ppm,
    "j2k": _raw_jp2,
}
_SIDE_BITS = {"gif": 16, "jpg": 16, "tga": 16, "pcx": 16, "sgi": 16, "webp": 24}


def _claimed_sizes(seed: int) -> Iterator[File]:
    """Yield headers that claim sizes which the data does not bear out."""
    huge = ((60000, 60000), (2**31 - 1, 1), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1), (2**32 - 1, 9))
    none = ((0, 0), (0, 9), (9, 0))
    for extension, make in _CLAIMS.items():
        bits = _SIDE_BITS.get(extension, 31 if extension == "bmp" else 32)
        for width, height in (*huge, (13378, 13378), (65535, 65535), (65535, 1), *none):
            if max(width, height) < 2**bits and not (extension == "webp" and 0 in (width, height)):
                sure = width * height > LIMIT and extension not in ("psd", "webp")
                yield File(
                    f"{extension}-{width}x{height}.{extension}",
                    make(width, height),
                    False if sure else None,
                    "too_many_pixels" if sure else None,
                )


def _bombs(seed: int) -> Iterator[File]:
    rows = zlib.compress(bytes(20000 * 2501), 1)
    bomb = _raw_png(20000, 20000, 1, 0, _chunk(b"IDAT", rows))
    yield File("png-20000x20000.png", bomb, False, "too_many_pixels")
    yield File("png-20000x20000.jpg", bomb, False, "too_many_pixels")
    yield File("gif-small_screen.gif", _raw_gif(1, 1, _gif_frame(60000, 60000, 2, 2)), False)
    yield File("gif-far_frame.gif", _raw_gif(1, 1, _gif_frame(0, 0, 60000, 60000)), False)
    far = _raw_gif(2, 2, _gif_frame(0, 0, 2, 2), _gif_frame(0, 0, 60000, 60000))
    yield File("gif-far_second_frame.gif", far)
    claim = _raw_png(60000, 60000, 8, 2)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(claim), 22)
    yield File("ico-png_inside.ico", struct.pack("<HHH", 0, 1, 1) + entry + claim, False)
    icon = _block(b"icns", _block(b"ic07", claim))
    yield File("icns-png_inside.icns", icon, False)
    yield File("pgm-digits.pgm", b"P5\n" + b"9" * 5000 + b" 1\n255\n", False)
    yield File("ppm-comment.ppm", b"P6\n#" + b"x" * 100_000 + b"\n1 1\n255\n\1\2\3", True)
    text = zlib.compress(bytes(BOMB_BYTES), 1)
    for name, chunk in (
        ("ztxt", _chunk(b"zTXt", b"Comment\0\0" + text)),
        ("itxt", _chunk(b"iTXt", b"Comment\0\1\0\0\0" + text)),
        ("iccp", _chunk(b"iCCP", b"profile\0\0" + text)),
    ):
        yield File(f"png-{name}_first.png", _png()[:33] + chunk + _png()[33:])
        yield File(f"png-{name}_last.png", _png()[:-12] + chunk + _IEND)
    many = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(900_000))) * 100
    yield File("png-many_ztxt.png", _png()[:33] + many + _png()[33:])
    data = zlib.compress(bytes(BOMB_BYTES), 1)  # many times what the header asks for
    yield File("png-long_idat.png", _raw_png(8, 8, 8, 0, _chunk(b"IDAT", data)))


def _shapes(seed: int) -> Iterator[File]:
    """Yield images of one pixel, one row, one column and odd sides."""
    saved = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
    for extension, format_ in saved.items():
        for size in ((1, 1), (1, 5000), (5000, 1), (2, 3), (7, 1), (1, 2), (3, 2), (1000, 3)):
            data = _encode(_picture("RGB", size), format_)
            yield File(f"{extension}-{size[0]}x{size[1]}.{extension}", data, True)


# What travels with the pixels.


def _exif(*entries: bytes, num_entries: int | None = None, next_ifd: int = 0) -> bytes:
    count = len(entries) if num_entries is None else num_entries
    ifd = struct.pack("<H", count) + b"".join(entries) + struct.pack("<I", next_ifd)
    return b"Exif\0\0II*\0\x08\0\0\0" + ifd


def _exif_blobs(seed: int) -> dict[str, bytes]:
    orient = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    rng = random.Random(f"{seed}/exif")
    return {
        "header_only": b"Exif\0\0",
        "no_ifd": b"Exif\0\0II*\0\x08\0\0\0",
        "wrong_magic": b"Exif\0\0XX*\0\x08\0\0\0" + bytes(20),
        "ifd_outside": b"Exif\0\0II*\0\xff\xff\xff\xff",
        "ifd_at_zero": b"Exif\0\0II*\0\0\0\0\0",
        "too_few_entries": _exif(orient, num_entries=9),
        "many_entries": _exif(orient, num_entries=65535),
        "cut_entry": _exif(orient)[:-9],
        "loop": _exif(orient, next_ifd=8),
        "orientation_0": _exif(struct.pack("<HHIHH", 0x112, 3, 1, 0, 0)),
        "orientation_9": _exif(struct.pack("<HHIHH", 0x112, 3, 1, 9, 0)),
        "orientation_65535": _exif(struct.pack("<HHIHH", 0x112, 3, 1, 65535, 0)),
        "orientation_text": _exif(struct.pack("<HHI4s", 0x112, 2, 4, b"six\0")),
        "orientation_pair": _exif(struct.pack("<HHIHH", 0x112, 3, 2, 6, 8)),
        "orientation_none": _exif(struct.pack("<HHIHH", 0x112, 3, 0, 6, 0)),
        "orientation_long": _exif(struct.pack("<HHII", 0x112, 4, 1, 6)),
        "orientation_byte": _exif(struct.pack("<HHII", 0x112, 1, 1, 6)),
        "orientation_twice": _exif(orient, struct.pack("<HHIHH", 0x112, 3, 1, 3, 0)),
        "orientation_outside": _exif(struct.pack("<HHII", 0x112, 5, 1, 0xFFFFFF)),
        "unknown_type": _exif(struct.pack("<HHII", 0x112, 99, 1, 6)),
        "wrong_offset": _exif(orient, struct.pack("<HHII", 0x10F, 2, 200, 0xFFFFFF)),
        "huge_count": _exif(orient, struct.pack("<HHII", 0x10F, 2, 0xFFFFFFFF, 26)),
        "resolution_by_zero": _exif(orient, struct.pack("<HHII", 0x11A, 5, 1, 38)) + bytes(8),
        "exif_ifd_outside": _exif(orient, struct.pack("<HHII", 0x8769, 4, 1, 0xFFFFFF)),
        "exif_ifd_loop": _exif(orient, struct.pack("<HHII", 0x8769, 4, 1, 8)),
        "exif_ifd_text": _exif(orient, struct.pack("<HHI4s", 0x8769, 2, 4, b"abc\0")),
        "huge": _exif(orient, struct.pack("<HHII", 0x927C, 7, 64000, 38)) + bytes(64000),
        "random": b"Exif\0\0II*\0" + rng.randbytes(2000),
    }


def _orientations(seed: int) -> Iterator[File]:
    saved = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "avif": "AVIF"}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        for extension, format_ in saved.items():
            if format_ in Image.SAVE:
                data = _encode(_picture("RGB"), format_, exif=exif.tobytes())
                yield File(f"{extension}-{orientation}.{extension}", data, True)
        data = _encode(_picture("RGB"), "TIFF", tiffinfo={0x112: orientation})
        yield File(f"tif-{orientation}.tif", data, True)


def _metadata(seed: int) -> Iterator[File]:
    rng = random.Random(f"{seed}/metadata")
    saved = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    profile = struct.pack(">I4sI4s4s4s", 3000, b"lcms", 0x04000000, b"mntr", b"RGB ", b"XYZ ")
    profiles = {
        "one_byte": b"x",
        "text": b"sRGB IEC61966-2.1",
        "zeros": bytes(3000),
        "random": rng.randbytes(3000),
        "cut": profile,
        "no_tags": profile + bytes(12) + b"acsp" + bytes(3000 - 40),
        "huge": profile + bytes(200_000),
        "cmyk": profile.replace(b"RGB ", b"CMYK") + bytes(12) + b"acsp" + bytes(3000 - 40),
    }
    for extension, format_ in saved.items():
        for name, blob in _exif_blobs(seed).items():
            data = _encode(_picture("RGB"), format_, exif=blob)
            yield File(f"exif-{name}.{extension}", data, True)
        for name, blob in profiles.items():
            data = _encode(_picture("RGB"), format_, icc_profile=blob)
            yield File(f"icc-{name}.{extension}", data, True)
    for name, blob in profiles.items():
        data = _encode(_picture("RGB"), "TIFF", icc_profile=blob)
        yield File(f"icc-{name}.tif", data, True)
    large = _exif() + bytes(2_000_000)
    for extension in ("png", "webp"):
        data = _encode(_picture("RGB"), saved[extension], exif=large)
        yield File(f"exif-2MB.{extension}", data, True)


# Each format's own traps.


def _png_cases(seed: int) -> Iterator[File]:
    picture = _png()
    idat = picture.index(b"IDAT") - 4
    head, body = picture[:idat], picture[idat:]
    rows = zlib.compress(bytes(8 * 25))
    data = _chunk(b"IDAT", rows)
    yield File("no_iend.png", picture[:-12])
    yield File("no_idat.png", head + _IEND, False)
    yield File("no_ihdr.png", _PNG_MAGIC + body, False)
    yield File("two_ihdr.png", _PNG_MAGIC + picture[8:33] * 2 + body)
    yield File("no_plte.png", _raw_png(8, 8, 8, 3, _chunk(b"IDAT", zlib.compress(bytes(8 * 9)))))
    yield File("late_plte.png", _raw_png(8, 8, 8, 2, data, _chunk(b"PLTE", bytes(9))))
    yield File("short_plte.png", _raw_png(8, 8, 8, 3, _chunk(b"PLTE", bytes(4)), data))
    yield File("bad_ihdr_crc.png", picture[:29] + b"\0\0\0\0" + picture[33:], False)
    yield File("bad_idat_crc.png", picture[:-16] + b"\0\0\0\0" + _IEND)
    yield File("bad_text_crc.png", head + _chunk(b"tEXt", b"a\0b", crc=0) + body)
    yield File("unknown_critical.png", head + _chunk(b"ABCD", b"x") + body)
    yield File("bad_chunk_name.png", head + _chunk(b"\0\1\2\3", b"x") + body)
    yield File("huge_chunk.png", head + b"\x7f\xff\xff\xfftEXt" + body)
    yield File("negative_chunk.png", head + b"\xff\xff\xff\xfftEXt" + body)
    yield File("empty_idats.png", head + _chunk(b"IDAT", b"") * 500 + body, True)
    yield File("bad_zlib.png", _raw_png(8, 8, 8, 2, _chunk(b"IDAT", b"not zlib at all")), False)
    yield File("bad_filter.png", _raw_png(8, 8, 8, 2, _chunk(b"IDAT", zlib.compress(b"\x09" * 200))))
    yield File("short_rows.png", _raw_png(8, 8, 8, 2, _chunk(b"IDAT", zlib.compress(bytes(9)))))
    yield File("empty_text.png", head + _chunk(b"tEXt", b"") + body)
    yield File("empty_ztxt.png", head + _chunk(b"zTXt", b"") + body)
    yield File("bad_ztxt.png", head + _chunk(b"zTXt", b"a\0\0not zlib") + body)
    yield File("bad_ztxt_method.png", head + _chunk(b"zTXt", b"a\0\x09abc") + body)
    yield File("empty_exif.png", head + _chunk(b"eXIf", b"") + body, True)
    yield File("bad_exif.png", head + _chunk(b"eXIf", b"no exif") + body, True)
    for kind in (b"tRNS", b"gAMA", b"cHRM", b"pHYs", b"iCCP", b"sRGB", b"acTL", b"fcTL", b"fdAT"):
        yield File(f"empty_{kind.decode()}.png", head + _chunk(kind, b"") + body)
        yield File(f"ffs_{kind.decode()}.png", head + _chunk(kind, b"\xff" * 40) + body)
    for color, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16)}.items():
        for depth in depths:
            channels = {0: 1, 2: 3, 3: 1, 4: 2}[color]
            pixels = b"".join(b"\0" + bytes((depth * channels * 8 + 7) // 8) for _ in range(8))
            palette = (_chunk(b"PLTE", bytes(range(6))),) if color == 3 else ()
            idats = _chunk(b"IDAT", zlib.compress(pixels))
            good = _raw_png(8, 8, depth, color, *palette, idats)
            yield File(f"color{color}_depth{depth}.png", good, True)
    for color, depth in ((2, 1), (3, 16), (5, 8), (7, 8), (0, 3), (6, 4), (255, 255), (0, 0)):
        yield File(f"bad_color{color}_depth{depth}.png", _raw_png(8, 8, depth, color, data), False)
    interlaced = _chunk(b"IDAT", zlib.compress(bytes(400)))
    adam7 = _PNG_MAGIC + _ihdr(8, 8, 8, 2, interlace=1) + interlaced + _IEND
    yield File("interlaced.png", adam7, True)
    yield File("interlaced_cut.png", adam7[:-20])
    yield File("bad_interlace.png", _PNG_MAGIC + _ihdr(8, 8, 8, 2, interlace=9) + data + _IEND)
    for mode, clear in (("P", bytes(range(256))), ("P", 3), ("L", 7), ("RGB", (1, 2, 3)), ("1", 1)):
        name = f"transparency_{mode}_{type(clear).__name__}.png"
        yield File(name, _png(mode, transparency=clear), True)
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 500_000)
    info.add_itxt("Title", "画像", "ja", "題")
    yield File("long_text.png", _png(pnginfo=info), True)


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data


def _without(data: bytes, marker: int) -> bytes:
    """Return the JPEG without its segments of this marker."""
    kept, at = data[:2], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        kept += b"" if data[at + 1] == marker else data[at:end]
        at = end
    return kept + data[at:]


def _jpeg_cases(seed: int) -> Iterator[File]:
    data, scan = _jpeg(), _jpeg().index(b"\xff\xda")
    cmyk, frame = _jpeg("CMYK"), _jpeg().index(b"\xff\xc0")
    yield File("missing_eoi.jpg", data[:-2])
    yield File("missing_dht.jpg", _without(data, 0xC4))  # as frames of MJPEG are
    yield File("missing_dqt.jpg", _without(data, 0xDB), False)
    yield File("missing_sof.jpg", _without(data, 0xC0), False)
    yield File("missing_app0.jpg", _without(data, 0xE0), True)
    yield File("no_scan.jpg", data[:scan] + b"\xff\xd9", False)
    yield File("no_scan_no_eoi.jpg", data[:scan], False)
    yield File("soi_only.jpg", b"\xff\xd8", False)
    yield File("soi_eoi.jpg", b"\xff\xd8\xff\xd9", False)
    yield File("soi_many.jpg", b"\xff\xd8" * 999, False)
    for marker in (0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB, 0xCD, 0xF7):  # 0xC9: arithmetic
        changed = data[: frame + 1] + bytes([marker]) + data[frame + 2 :]
        yield File(f"sof_{marker:x}.jpg", changed)
    for name, at, value in (
        ("precision_12", 4, 12),
        ("components_0", 9, 0),
        ("components_4", 9, 4),
    ):
        changed = data[: frame + at] + bytes([value]) + data[frame + at + 1 :]
        yield File(f"{name}.jpg", changed)
    for sampling in (0x00, 0x41, 0x14, 0x44, 0x55, 0x33):
        changed = data[: frame + 11] + bytes([sampling]) + data[frame + 12 :]
        yield File(f"sampling_{sampling:02x}.jpg", changed)
    yield File("cmyk_no_adobe.jpg", _without(cmyk, 0xEE), True)
    adobe = cmyk.index(b"Adobe") + 11
    yield File("cmyk_ycck.jpg", cmyk[:adobe] + b"\2" + cmyk[adobe + 1 :], True)
    yield File("adobe_rgb.jpg", data[:2] + _segment(0xEE, b"Adobe\0\x64" + bytes(5)) + data[2:], True)
    yield File("adobe_short.jpg", data[:2] + _segment(0xEE, b"Adobe") + data[2:])
    yield File("fill_bytes.jpg", data[:2] + b"\xff" * 5000 + data[2:])
    yield File("garbage_between.jpg", data[:2] + b"garbage" + data[2:])
    yield File("zero_length.jpg", data[:2] + b"\xff\xe5\0\0" + data[2:])
    yield File("length_1.jpg", data[:2] + b"\xff\xe5\0\1" + data[2:])
    yield File("many_comments.jpg", data[:2] + _segment(0xFE, b"x" * 99) * 5000 + data[2:], True)
    yield File("many_scans.jpg", data[:-2] + data[scan:-2] * 200 + b"\xff\xd9")
    progressive = _jpeg(progressive=True)
    last = progressive.rindex(b"\xff\xda")
    yield File("progressive_scans.jpg", progressive[:-2] + progressive[last:-2] * 300 + b"\xff\xd9")
    yield File("dnl_height.jpg", data[: frame + 5] + b"\0\0" + data[frame + 7 :])
    for name, body in {
        "jfif_short": _segment(0xE0, b"JFIF\0"),
        "icc_gap": _segment(0xE2, b"ICC_PROFILE\0\3\3" + bytes(99)),
        "icc_short": _segment(0xE2, b"ICC_PROFILE\0"),
        "xmp": _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta"),
        "photoshop": _segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff" + b"\xff" * 40),
        "mpf": _segment(0xE2, b"MPF\0II*\0\xff\xff\xff\x7f"),
        "mpf_zero": _segment(0xE2, b"MPF\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
        "exif_twice": _segment(0xE1, _exif()) * 2,
        "exif_bad": _segment(0xE1, b"Exif\0\0"),
    }.items():
        yield File(f"{name}.jpg", data[:2] + body + data[2:])


def _tiff_cases(seed: int) -> Iterator[File]:
    yield File("plain.tif", _raw_tiff(), True)
    yield File("ifd_loop.tif", _raw_tiff(next_ifd=8))
    yield File("ifd_outside.tif", _raw_tiff(next_ifd=0x7FFFFFFF))
    yield File("ifd_in_data.tif", _raw_tiff(next_ifd=130))
    yield File("no_tags.tif", _raw_tiff(num_tags=0), False)
    yield File("tags_65535.tif", _raw_tiff(num_tags=65535))
    yield File("first_ifd_outside.tif", b"II*\0\xff\xff\xff\x7f" + bytes(99), False)
    yield File("first_ifd_zero.tif", b"II*\0\0\0\0\0" + bytes(99))
    for tag in (256, 257, 258, 259, 262, 273, 277, 278, 279):
        yield File(f"no_{tag}.tif", _raw_tiff(drop=(tag,)))
        for name, entry in (
            ("count_huge", (4, 0xFFFFFFFF, 8)),
            ("count_million", (3, 1_000_000, 8)),
            ("count_0", (4, 0, 0)),
            ("value_huge", (4, 1, 0x7FFFFFFF)),
            ("value_0", (3, 1, 0)),
            ("text", (2, 4, 0x00636261)),
            ("rational", (5, 1, 0)),
            ("type_99", (99, 1, 8)),
        ):
            yield File(f"{tag}_{name}.tif", _raw_tiff(tags={tag: entry}))
    for compression in (2, 3, 4, 5, 6, 7, 8, 34676, 34712, 34925, 50000, 50001, 65000):
        yield File(f"compression_{compression}.tif", _raw_tiff(tags={259: (3, 1, compression)}))
    for photometric in (0, 2, 3, 4, 5, 6, 8, 32803, 65535):
        yield File(f"photometric_{photometric}.tif", _raw_tiff(tags={262: (3, 1, photometric)}))
    for bits in (1, 2, 4, 12, 16, 32, 64):
        yield File(f"bits_{bits}.tif", _raw_tiff(tags={258: (3, 1, bits)}))
    for orientation in (0, 9, 65535):
        yield File(f"orientation_{orientation}.tif", _raw_tiff(tags={274: (3, 1, orientation)}))
    tiles: _Tags = {322: (4, 1, 2**20), 323: (4, 1, 2**20), 324: (4, 1, 8), 325: (4, 1, 64)}
    yield File("huge_tiles.tif", _raw_tiff(tags=tiles, drop=(273, 278, 279)))
    tiles |= {322: (4, 1, 0), 323: (4, 1, 0)}
    yield File("zero_tiles.tif", _raw_tiff(tags=tiles, drop=(273, 278, 279)))
    yield File("sub_ifd_loop.tif", _raw_tiff(tags={330: (4, 1, 8), 34665: (4, 1, 8)}))
    big = b"II\x2b\0\x08\0\0\0\x10\0\0\0\0\0\0\0"
    yield File("big_many.tif", big + b"\xff" * 7 + b"\x7f" + bytes(99))


def _gif_cases(seed: int) -> Iterator[File]:
    frame = _gif_frame(0, 0, 2, 2)
    yield File("no_frames.gif", _raw_gif(2, 2))
    yield File("no_trailer.gif", _raw_gif(2, 2, frame)[:-1])
    yield File("plain.gif", _raw_gif(2, 2, frame), True)
    local = _gif_frame(0, 0, 2, 2, palette=True)
    yield File("local_palettes.gif", _raw_gif(2, 2, local, local, palette=False), True)
    yield File("no_palette.gif", _raw_gif(2, 2, frame, palette=False))
    yield File("frame_outside.gif", _raw_gif(2, 2, _gif_frame(9, 9, 2, 2)))
    yield File("frame_0x0.gif", _raw_gif(2, 2, _gif_frame(0, 0, 0, 0)))
    yield File("screen_0x0.gif", _raw_gif(0, 0, frame))
    yield File("short_data.gif", _raw_gif(9, 9, _gif_frame(0, 0, 9, 9)))
    for bits in (0, 1, 11, 12, 255):
        yield File(f"code_bits_{bits}.gif", _raw_gif(2, 2, frame[:10] + bytes([bits]) + frame[11:]))
    control = b"\x21\xf9\x04\x05\0\0\xff\0"
    yield File("transparent_255.gif", _raw_gif(2, 2, control, frame), True)
    yield File("control_twice.gif", _raw_gif(2, 2, control, control, frame))
    yield File("control_short.gif", _raw_gif(2, 2, b"\x21\xf9\x01\x05\0", frame))
    yield File("control_empty.gif", _raw_gif(2, 2, b"\x21\xf9\0", frame))
    yield File("unknown_block.gif", _raw_gif(2, 2, b"\x99" * 9, frame))
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * 4000 + b"\0"
    yield File("long_comment.gif", _raw_gif(2, 2, comment, frame), True)
    yield File("loop_short.gif", _raw_gif(2, 2, b"\x21\xff\x0bNETSCAPE2.0\x01\x01\0", frame))
    yield File("many_frames.gif", _raw_gif(2, 2, (control + frame) * 3000), True)


def _bmp_cases(seed: int) -> Iterator[File]:
    for bits in (1, 4, 8, 16, 24, 32):
        rows = bytes((8 * bits + 31) // 32 * 4 * 8)
        yield File(f"up_{bits}.bmp", _raw_bmp(8, 8, bits, 0, rows), True)
        yield File(f"down_{bits}.bmp", _raw_bmp(8, -8, bits, 0, rows), True)
        yield File(f"negative_width_{bits}.bmp", _raw_bmp(-8, 8, bits, 0, rows))
    rle8, rle4 = b"\x08\x01\0\0" * 8 + b"\0\1", b"\x08\x12\0\0" * 8 + b"\0\1"
    yield File("rle8.bmp", _raw_bmp(8, 8, 8, 1, rle8), True)
    yield File("rle4.bmp", _raw_bmp(8, 8, 4, 2, rle4), True)
    yield File("rle8_short.bmp", _raw_bmp(8, 8, 8, 1, rle8[:9]))
    yield File("rle8_no_end.bmp", _raw_bmp(8, 8, 8, 1, rle8[:-2]))
    yield File("rle8_absolute.bmp", _raw_bmp(8, 8, 8, 1, b"\0\xff" + bytes(9)))
    yield File("rle8_jump.bmp", _raw_bmp(8, 8, 8, 1, b"\0\2\xff\xff" * 9))
    yield File("rle8_in_24.bmp", _raw_bmp(8, 8, 24, 1, rle8))
    for compression in (3, 4, 5, 6, 99, 2**32 - 1):
        yield File(f"compression_{compression}.bmp", _raw_bmp(8, 8, 32, compression, bytes(256)))
    for bits in (0, 2, 7, 64, 65535):
        yield File(
            f"bits_{bits}.bmp",
            _raw_bmp(8, 8, 24, 0, bytes(256)).replace(
                struct.pack("<HH", 1, 24), struct.pack("<HH", 1, bits), 1
            ),
        )
    plain = _raw_bmp(8, 8, 8, 0, bytes(64))
    for name, at, value in (
        ("offset_0", 10, 0),
        ("offset_outside", 10, 0x7FFFFFFF),
        ("header_0", 14, 0),
        ("header_12", 14, 12),
        ("header_124", 14, 124),
        ("header_huge", 14, 0x7FFFFFFF),
        ("colors_huge", 46, 0x7FFFFFFF),
        ("colors_1", 46, 1),
    ):
        yield File(f"{name}.bmp", plain[:at] + struct.pack("<I", value) + plain[at + 4 :])


def _icon(width: int, height: int, image: bytes, *, size: int | None = None, at: int = 22) -> bytes:
    length = len(image) if size is None else size
    entry = struct.pack("<BBBBHHII", width, height, 0, 0, 1, 32, length, at)
    return struct.pack("<HHH", 0, 1, 1) + entry + image


def _other_cases(seed: int) -> Iterator[File]:
    png = _png("RGBA")
    bitmap = _raw_bmp(8, 16, 32, 0, bytes(8 * 8 * 4 + 32))[14:]
    yield File("bmp_inside.ico", _icon(8, 8, bitmap), True)
    yield File("png_inside.ico", _icon(48, 32, png), True)
    yield File("png_other_size.ico", _icon(16, 16, png))
    yield File("bmp_other_size.ico", _icon(16, 16, bitmap))
    yield File("bmp_cut.ico", _icon(8, 8, bitmap[:99]))
    yield File("image_outside.ico", _icon(8, 8, png, at=0x7FFFFFFF))
    yield File("image_huge.ico", _icon(48, 32, png, size=0x7FFFFFFF))
    yield File("image_at_0.ico", _icon(8, 8, png, at=0))
    yield File("no_images.ico", b"\0\0\1\0\0\0", False)
    yield File("images_65535.ico", b"\0\0\1\0\xff\xff" + bytes(99))
    pixels = bytes(range(192))
    yield File("plain.psd", _raw_psd(8, 8, pixels), True)
    yield File("cut.psd", _raw_psd(8, 8, pixels[:99]))
    yield File("header.psd", _raw_psd(8, 8, b"")[:26], False)
    yield File("resources_huge.psd", _raw_psd(8, 8, pixels)[:30] + b"\x7f\xff\xff\xff" + pixels)
    yield File("layers_huge.psd", _raw_psd(8, 8, pixels)[:34] + b"\x7f\xff\xff\xff" + pixels)
    for name, data in {
        "plain.pbm": b"P1\n2 2\n0 1\n1 0\n",
        "plain.pgm": b"P2\n2 2\n255\n0 1 2 3\n",
        "plain.ppm": b"P3\n1 1\n255\n0 1 2\n",
        "comments.pgm": b"P2 # a\n2 # b\n2\n255 # c\n0 1 2 3\n",
        "deep.pgm": b"P5\n2 1\n65535\n\1\2\3\4",
        "scaled.pgm": b"P5\n2 1\n100\n\1\2",
        "float.pfm": b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5),
        "any.pam": b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n\1\2\3",
    }.items():
        yield File(name, data, None if name.endswith("pam") else True)
    for name, data in {
        "maxval_0.pgm": b"P5\n2 1\n0\n\1\2",
        "maxval_huge.pgm": b"P5\n2 1\n99999\n\1\2\3\4",
        "negative.pgm": b"P5\n-2 1\n255\n\1\2",
        "letters.pgm": b"P5\na b\n255\n\1\2",
        "over.pgm": b"P2\n2 1\n9\n10 11\n",
        "words.pgm": b"P2\n2 1\n255\none two\n",
        "short.pgm": b"P2\n2 2\n255\n1\n",
        "nan.pfm": b"Pf\n1 1\nnan\n" + bytes(4),
        "zero.pfm": b"Pf\n1 1\n0\n" + bytes(4),
        "lossless_alone.webp": b"RIFF\x0c\0\0\0WEBPVP8L\0\0\0\0",
        "no_image.webp": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(10),
        "huge_chunk.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(99),
        "no_meta.avif": _box(b"ftyp", b"avif\0\0\0\0avif"),
        "empty_meta.avif": _box(b"ftyp", b"avif\0\0\0\0avif") + _box(b"meta", bytes(4)),
        "box_size_0.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\0ftypjp2 ",
        "box_size_1.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\1jp2h" + b"\xff" * 8 + bytes(20),
        "no_entries.icns": _block(b"icns", b""),
        "zero_entry.icns": _block(b"icns", b"ic07\0\0\0\0" + bytes(99)),
        "letters.xbm": b"#define a_width x\n#define a_height y\nstatic char a_bits[] = {\n0x00};\n",
        "short.xbm": b"#define a_width 64\n#define a_height 64\nstatic char a_bits[] = {\n0x00};\n",
        "cut.xpm": b'/* XPM */\nstatic char *a[] = {\n"2 2 1 1",\n"a c #000000",\n"aa",\n',
        "huge.xpm": b'/* XPM */\nstatic char *a[] = {\n"9999999 9999999 1 1",\n',
        "short.im": b"Image type: RGB\r\nName: a\r\nImage size (x*y): 9*9\r\n" + bytes(9),
        "long_line.im": b"Image type: RGB\r\n" + b"x" * 100_000,
        "naxis_0.fits": b"SIMPLE  =                    T".ljust(80) + b"NAXIS   = 0".ljust(80),
        "no_end.fits": b"SIMPLE  =                    T".ljust(80) + b"NAXIS   = 2".ljust(80) * 99,
    }.items():
        yield File(name, data)


_GROUPS: dict[str, Callable[[int], Iterator[File]]] = {
    "modes": _modes,
    "truncated": _truncated,
    "fuzzed": _fuzzed,
    "trailing": _trailing,
    "not_images": _not_images,
    "blank": _blank,
    "only_magic": _only_magic,
    "names": _names,
    "wrong_extensions": _wrong_extensions,
    "claimed_sizes": _claimed_sizes,
    "bombs": _bombs,
    "shapes": _shapes,
    "orientations": _orientations,
    "metadata": _metadata,
    "png": _png_cases,
    "jpeg": _jpeg_cases,
    "tiff": _tiff_cases,
    "gif": _gif_cases,
    "bmp": _bmp_cases,
    "others": _other_cases,
}
