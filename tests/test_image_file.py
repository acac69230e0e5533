"""Opening encoded images: what decodes, and why the rest does not."""

import contextlib
import io
import struct
import threading
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from cvt_model import ImageError, open_image

LIMIT = 1_000_000


def random_rgb(width=48, height=32):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def error_of(data, max_pixels=LIMIT):
    with pytest.raises(ImageError) as caught:
        open_image(data, max_pixels)
    assert caught.value.message
    assert "0x" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM"])
def test_common_formats_decode_as_pillow_does(format):
    data = encode(random_rgb(), format)
    opened = open_image(data, LIMIT)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(opened.image_rgb, expected)
    assert (opened.width, opened.height, opened.format) == (48, 32, format)


def with_transparency(image, transparency):
    palette = image.quantize(16)
    palette.info["transparency"] = transparency
    return palette


MODES = {
    "1": ("PNG", lambda image: image.convert("1")),
    "L": ("PNG", lambda image: image.convert("L")),
    "LA": ("PNG", lambda image: image.convert("LA")),
    "P": ("PNG", lambda image: image.quantize(16)),
    "P_one_transparent": ("GIF", lambda image: with_transparency(image, 3)),
    "P_transparent_bytes": ("PNG", lambda image: with_transparency(image, bytes(range(16)))),
    "PA": ("TIFF", lambda image: image.convert("PA")),
    "RGBA": ("PNG", lambda image: image.convert("RGBA").rotate(30)),
    "CMYK": ("JPEG", lambda image: image.convert("CMYK")),
    "YCbCr": ("TIFF", lambda image: image.convert("YCbCr")),
    "LAB": ("TIFF", lambda image: Image.merge("LAB", image.split())),
    "I;16": ("PNG", lambda image: Image.fromarray(np.array(image.convert("L"), "uint16") * 9)),
    "I": ("TIFF", lambda image: image.convert("I")),
    "F": ("TIFF", lambda image: image.convert("F")),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_what_convert_gives(name):
    format, make = MODES[name]
    try:
        data = encode(make(random_rgb()), format)
    except OSError:
        pytest.skip(f"this Pillow cannot write {name} as {format}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = Image.open(io.BytesIO(data)).convert("RGB")
        except ValueError:
            assert error_of(data).reason == "unsupported"
            return
    assert np.array_equal(open_image(data, LIMIT).image_rgb, expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_and_leaves_the_stored_size(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(random_rgb(), format, exif=exif)
    opened = open_image(data, LIMIT)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(opened.image_rgb, upright.convert("RGB"))
    assert (opened.width, opened.height) == (48, 32)
    assert opened.image_rgb.size == ((32, 48) if orientation >= 5 else (48, 32))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0",
    ],
)
def test_malformed_exif_means_no_orientation(exif):
    data = encode(random_rgb(), "JPEG", exif=exif)
    assert open_image(data, LIMIT).image_rgb.size == (48, 32)


def test_an_impossible_orientation_is_none():
    entry = struct.pack(">HHI4s", 0x0112, 2, 4, b"up!\0")  # text, where a number belongs
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + bytes(4)
    data = encode(random_rgb(), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == "up!"
    assert open_image(data, LIMIT).image_rgb.size == (48, 32)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(format):
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(first, format, save_all=True, append_images=[second], **options)
    assert open_image(data, LIMIT).image_rgb.getpixel((4, 4)) == (255, 0, 0)


def test_no_bytes_are_empty():
    assert error_of(b"").reason == "empty"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*convert it to JPEG"),
        (b"\xff\x0a\x00\x10" + b"\x80\x01" * 20, "JPEG XL.*convert"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b'<?xml version="1.0"?><svg xmlns="x"></svg>', "SVG.*render"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF.*render"),
        (b"\n<!DOCTYPE html><html><body>403", "HTML page.*download probably failed"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "MP4"),
        (b"\x1a\x45\xdf\xa3\x01\0\0\0", "Matroska"),
        (b"RIFF\0\1\0\0AVI LIST", "AVI video"),
        (b"PK\3\4\x14\0", "ZIP"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b'{"error": "not found"}', "text"),
        ("naïve".encode() * 300, "text"),
        (bytes(100), "zero bytes"),
        (b"\x07\x93\xfe\xe1" * 30, "no known image format"),
    ],
)
def test_what_is_no_image_is_called_what_it_appears_to_be(data, message):
    error = error_of(data)
    assert error.reason == "not_an_image"
    with pytest.raises(ImageError, match=message):
        raise error


def test_an_image_over_the_limit_is_refused_before_decoding(monkeypatch):
    data = encode(random_rgb(), "PNG")
    assert open_image(data, 48 * 32).width == 48
    assert open_image(data, None).width == 48
    monkeypatch.setattr(Image.Image, "convert", pytest.fail)
    error = error_of(data, 48 * 32 - 1)
    assert error.reason == "too_many_pixels"
    assert "1536 pixels" in error.message
    assert "over the limit of 1535" in error.message


def test_a_bomb_inside_an_icon_is_refused():
    png = encode(Image.new("RGB", (3000, 3000)), "PNG")
    icon = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    assert error_of(icon).reason == "too_many_pixels"


@pytest.mark.parametrize(
    ("format", "kept"),
    [("JPEG", 0.9), ("JPEG", 0.5), ("JPEG", 0.05), ("PNG", 0.9), ("PNG", 0.5), ("PNG", 30),
     ("GIF", 0.7), ("WEBP", 0.8), ("WEBP", 20), ("BMP", 0.9), ("TIFF", 0.5), ("AVIF", 0.9)],
)  # fmt: skip
def test_data_that_end_early_are_truncated(format, kept):
    data = encode(random_rgb(), format)
    cut = data[: kept if kept > 1 else int(len(data) * kept)]
    error = error_of(cut)
    assert (error.reason, "ends early" in error.message) == ("truncated", True), error


def overwrite(data, at, with_bytes):
    return data[:at] + with_bytes + data[at + len(with_bytes) :]


@pytest.mark.parametrize(
    "data",
    [
        overwrite(encode(random_rgb(), "PNG"), 60, bytes(100)),
        overwrite(encode(random_rgb(), "JPEG"), 30, b"\xff" * 90),
        overwrite(encode(random_rgb(), "WEBP"), 20, bytes(60)),
        b"GIF89a\x10\0\x10\0\0\0\0,\0\0\0\0\x10\0\x10\0\0\x02\x01\xff\0;",
        b"II*\0\x08\0\0\0\xff\xff" + bytes(200),
        b"BM" + bytes(60),
    ],
)
def test_damaged_data_are_corrupt(data):
    assert error_of(data).reason in ("corrupt", "unsupported")


def test_a_damaged_stream_names_its_format():
    error = error_of(overwrite(encode(random_rgb(), "PNG"), 60, bytes(100)))
    assert error.reason == "corrupt"
    assert error.message.startswith("PNG data is damaged")


def test_formats_that_pillow_knows_and_cannot_decode_are_unsupported(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
    assert error_of(eps).reason == "unsupported"
    assert error_of(b"\x89HDF\r\n\x1a\n" + bytes(64)).reason == "unsupported"


@pytest.mark.parametrize(
    "raised",
    [ZeroDivisionError, AttributeError, MemoryError, SyntaxError, RecursionError, KeyError],
)
def test_whatever_a_decoder_raises_becomes_a_reason(raised, monkeypatch):
    def fail(self):
        raise raised

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    error = error_of(encode(random_rgb(), "BMP"))
    assert error.reason == "corrupt"
    assert isinstance(error.__cause__, raised)


def test_interrupts_are_not_swallowed(monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_image(encode(random_rgb(), "BMP"), LIMIT)


def test_random_damage_raises_nothing_else_and_prints_nothing(capfd, recwarn):
    rng = np.random.default_rng(5)
    reasons = set()
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PPM", "TGA"):
        options = {"compression": "tiff_lzw"} if format == "TIFF" else {}
        data = encode(random_rgb(), format, **options)
        for _ in range(40):
            damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
            for at in rng.integers(0, len(damaged), 4):
                damaged[at] = rng.integers(256)
            try:
                open_image(bytes(damaged), LIMIT)
            except ImageError as error:
                reasons.add(error.reason)
    assert {"truncated", "corrupt", "not_an_image"} <= reasons
    assert capfd.readouterr() == ("", "")
    assert not recwarn


def test_libtiff_says_nothing_about_damaged_tiffs(capfd):
    data = encode(random_rgb().convert("1"), "TIFF", compression="group4")
    for at in range(8, 100, 4):
        with contextlib.suppress(ImageError):
            open_image(overwrite(data, at, b"\x11\x22\x33\x44"), LIMIT)
    assert capfd.readouterr() == ("", "")


def test_settings_of_the_process_are_restored_after_threads_that_overlap():
    data = encode(with_transparency(random_rgb(), bytes(range(16))), "PNG")
    before = list(warnings.filters)
    limit = Image.MAX_IMAGE_PIXELS
    threads = [
        threading.Thread(target=lambda: [open_image(data, LIMIT) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
    assert limit == Image.MAX_IMAGE_PIXELS
