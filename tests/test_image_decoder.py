"""Fast decoding is close to exact whatever the image, and exact is the reference's."""

import io

import numpy as np
import pytest
from PIL import Image

from cvt_model import image_decoder
from cvt_model.errors import ImageError
from cvt_model.image_decoder import DRAFT_GAP, decode_image
from cvt_model.image_file import open_image, open_stored
from cvt_model.image_processor import CvtImageProcessor
from tests.conftest import make_image
from tests.test_image_processor import SETTINGS, SHAPES

CVT = CvtImageProcessor(size=224, crop_pct=0.875)


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95, **options} if kind == "JPEG" else options))
    return buffer.getvalue()


def picture(width, height, seed=3):
    """Something that looks otherwise from every side."""
    return make_image(seed, (64, 64)).resize((width, height), Image.Resampling.BICUBIC)


def exact_and_fast(data, processor=CVT):
    exact, fast = (decode_image(data, processor, None, fast=fast) for fast in (False, True))
    assert exact[1:] == fast[1:]
    assert exact.pixels.shape == fast.pixels.shape
    assert fast.pixels.dtype == np.uint8
    return exact.pixels.astype(int), fast.pixels.astype(int)


def difference(exact, fast):
    return np.abs(exact - fast).mean()


def spy_on(monkeypatch):
    """The sizes that open_stored gave, and the (size, filter, box) of every resize."""
    stored, resized = [], []
    resize = Image.Image.resize

    def spying_open(*args):
        stored.append(open_stored(*args))
        return stored[-1]

    def spying_resize(image, size, resample=None, box=None, **options):
        resized.append((size, resample, box))
        return resize(image, size, resample, box, **options)

    monkeypatch.setattr(image_decoder, "open_stored", spying_open)
    monkeypatch.setattr(Image.Image, "resize", spying_resize)
    return stored, resized


def test_exact_is_the_whole_image_opened_and_preprocessed():
    data = encode(picture(500, 375))
    opened = open_image(data, None)
    decoded = decode_image(data, CVT, None)
    assert np.array_equal(decoded.pixels, CVT.to_pixels(opened.image_rgb))
    assert decoded[1:] == opened[1:] == (500, 375, "JPEG")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_around_the_same_crop(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (1003, 652) if kind == "JPEG" else (503, 352)  # odd, so that a crop off by one would show
    data = encode(picture(*size), kind, exif=exif)
    exact, fast = exact_and_fast(data)
    assert difference(exact, fast) < 0.8
    for turned in (fast[::-1], fast[:, ::-1], fast[::-1, ::-1], fast.transpose(1, 0, 2)):
        assert difference(exact, turned) > 10
    moved = difference(exact[1:], fast[:-1]), difference(exact[:, 1:], fast[:, :-1])
    assert difference(exact, fast) < min(moved)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_and_shape_comes_close_to_exact(name):
    processor = CvtImageProcessor.from_dict(SETTINGS[name])
    for shape in [*SHAPES, (900, 700), (640, 1600)]:
        data = encode(picture(*shape), "PNG")
        exact, fast = exact_and_fast(data, processor)
        assert difference(exact, fast) < 2.5, shape


@pytest.mark.parametrize("name", ["default_384", "224", "center_crop", "center_pad", "padded", "two_edges"])
def test_every_setting_comes_close_to_exact_from_a_drafted_jpeg(name, monkeypatch):
    processor = CvtImageProcessor.from_dict(SETTINGS[name])
    stored, _ = spy_on(monkeypatch)
    exact, fast = exact_and_fast(encode(picture(2500, 2100)), processor)
    assert stored[0].image_rgb.width <= 1250
    assert difference(exact, fast) < 2.5


def test_without_a_resize_fast_is_exact():
    processor = CvtImageProcessor.from_dict(SETTINGS["crop_only"])
    exact, fast = exact_and_fast(encode(picture(900, 700)), processor)
    assert np.array_equal(exact, fast)


MODES = {
    "1": "PNG",
    "L": "JPEG",
    "LA": "PNG",
    "P": "GIF",
    "RGBA": "PNG",
    "CMYK": "JPEG",
    "YCbCr": "TIFF",
    "I;16": "PNG",
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_comes_close_to_exact(mode):
    image = picture(1200, 900)
    grey = np.array(image.convert("L"), "uint16")
    image = Image.fromarray(grey * 257) if mode == "I;16" else image.convert(mode)
    exact, fast = exact_and_fast(encode(image, MODES[mode]))
    assert difference(exact, fast) < 2.5


def test_a_multi_picture_file_is_drafted_as_a_jpeg(monkeypatch):
    stored, _ = spy_on(monkeypatch)
    image = picture(1600, 1200)
    data = encode(image, "MPO", save_all=True, append_images=[image.rotate(180)], quality=95)
    exact, fast = exact_and_fast(data)
    assert stored[0].format == "MPO"
    assert stored[0].image_rgb.size == (800, 600)
    assert difference(exact, fast) < 1


@pytest.mark.parametrize(
    ("size", "drafted"),
    [
        ((500, 375), (500, 375)),
        ((639, 640), (639, 640)),
        ((640, 640), (320, 320)),
        ((1280, 1280), (320, 320)),
        ((4000, 3000), (500, 375)),
        ((2556, 2556), (639, 639)),
        ((3003, 4001), (376, 501)),
    ],
)
def test_a_jpeg_is_decoded_smaller_but_never_nearer_than_the_gap(size, drafted, monkeypatch):
    stored, resized = spy_on(monkeypatch)
    decoded = decode_image(encode(Image.new("RGB", size)), CVT, None, fast=True)
    assert (decoded.width, decoded.height) == size
    assert stored[0].image_rgb.size == drafted
    assert stored[0].size == size
    assert drafted == size or min(drafted) >= 256 * DRAFT_GAP
    assert len(resized) == 1


def test_the_crop_is_that_of_the_whole_images_size_and_not_of_the_drafts(monkeypatch):
    _, resized = spy_on(monkeypatch)
    decode_image(encode(Image.new("RGB", (4003, 3000))), CVT, None, fast=True)  # drafted: 501 x 375
    ((size, _, box),) = resized
    assert size == (224, 224)
    assert box == pytest.approx((58 / 341 * 501, 16 / 256 * 375, 282 / 341 * 501, 240 / 256 * 375))


@pytest.mark.parametrize(
    ("size", "resample", "used"),
    [
        ((500, 375), Image.Resampling.BICUBIC, Image.Resampling.HAMMING),
        ((500, 375), Image.Resampling.LANCZOS, Image.Resampling.HAMMING),
        ((500, 375), Image.Resampling.BILINEAR, Image.Resampling.BILINEAR),
        ((500, 375), Image.Resampling.NEAREST, Image.Resampling.NEAREST),
        ((200, 150), Image.Resampling.BICUBIC, Image.Resampling.BICUBIC),
        ((4000, 3000), Image.Resampling.BICUBIC, Image.Resampling.BICUBIC),
    ],
)
def test_a_narrow_filter_takes_the_place_of_a_wide_one_where_it_pays(size, resample, used, monkeypatch):
    _, resized = spy_on(monkeypatch)
    processor = CvtImageProcessor(size=224, crop_pct=0.875, resample=resample)
    decode_image(encode(Image.new("RGB", size)), processor, None, fast=True)
    ((_, found, _),) = resized
    assert found == used


def test_the_limit_of_pixels_is_that_of_the_whole_image():
    data = encode(picture(1600, 1200))
    assert decode_image(data, CVT, 1600 * 1200, fast=True).width == 1600
    with pytest.raises(ImageError, match=r"1920000 pixels.*over the limit"):
        decode_image(data, CVT, 1600 * 1200 - 1, fast=True)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_a_jpeg_that_ends_early_is_truncated_in_either_mode(kept):
    data = encode(picture(1600, 1200))
    for fast in (False, True):
        with pytest.raises(ImageError) as caught:
            decode_image(data[: int(len(data) * kept)], CVT, None, fast=fast)
        assert caught.value.reason == "truncated"


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 2)])
def test_a_thread_of_pixels_is_decoded_fast_without_its_gigabytes(shape, monkeypatch):
    _, resized = spy_on(monkeypatch)
    exact, fast = exact_and_fast(encode(picture(*shape), "PNG"))
    assert np.array_equal(exact, fast)
    assert max(width * height for (width, height), *_ in resized) <= 224 * 1000


def test_embeddings_of_fast_pixels_point_where_those_of_exact_ones_do(tiny_model):
    from cvt_model.checkpoint import resolve_checkpoint
    from cvt_model.inference import InferenceModel

    checkpoint = resolve_checkpoint(str(tiny_model))
    model = InferenceModel(checkpoint, precision="float32", backend="torch")
    datas = [encode(make_image(seed, size)) for seed, size in enumerate([(500, 375), (1600, 1200)] * 4)]
    exact, fast = (
        model(
            np.stack([decode_image(data, checkpoint.processor, None, fast=fast).pixels for data in datas])
        )
        for fast in (False, True)
    )
    a, b = (e.embedding / np.linalg.norm(e.embedding, axis=1, keepdims=True) for e in (exact, fast))
    assert (a * b).sum(axis=1).min() > 0.995
    assert (a @ b.T).argmax(axis=1).tolist() == list(range(len(datas)))
