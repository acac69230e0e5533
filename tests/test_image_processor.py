"""Preprocessing against transformers' processor in the same process."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from cvt_model import image_processor
from cvt_model.image_processor import CvtImageProcessor

# Cases that the reference treats differently: below and from 384 on, crops and paddings.
SETTINGS = {
    "default_384": {},
    "224": {"size": {"shortest_edge": 224}},
    "old_integer": {"size": 224, "feature_extractor_type": "ConvNextFeatureExtractor"},
    "tiny": {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
    "odd": {"size": {"shortest_edge": 47}, "crop_pct": 0.9, "resample": 2},
    "no_crop": {"size": {"shortest_edge": 64}, "crop_pct": 1.0, "resample": 0},
    "padded": {"size": {"shortest_edge": 64}, "crop_pct": 1.7, "resample": 1},
    "padded_odd": {"size": {"shortest_edge": 45}, "crop_pct": 1.4, "resample": 4},
    "center_crop": {"size": {"shortest_edge": 48}, "do_center_crop": True, "crop_size": 31},
    "center_pad": {
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": {"height": 41, "width": 20},
    },
    "crop_only": {"do_resize": False, "do_center_crop": True, "crop_size": [30, 50]},
    "as_is": {"do_resize": False},
    "two_edges": {"size": {"shortest_edge": 40, "longest_edge": 50}},
    "400": {"size": {"shortest_edge": 400}, "resample": 5},
}
SHAPES = [(64, 48), (48, 64), (33, 33), (1, 1), (1, 9), (9, 1), (2, 300), (300, 7), (251, 333)]


def random_image(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def reference_pixels(settings, image):
    reference = ConvNextImageProcessorPil(**settings)
    result = reference(image, do_rescale=False, do_normalize=False, return_tensors="np")
    return np.moveaxis(result["pixel_values"][0], 0, -1)


@pytest.mark.parametrize("name", SETTINGS)
def test_pixels_equal_those_of_transformers_bit_for_bit(name):
    processor = CvtImageProcessor.from_dict(SETTINGS[name])
    for shape in SHAPES:
        image = random_image(*shape)
        ours, theirs = processor.to_pixels(image), reference_pixels(SETTINGS[name], image)
        assert ours.dtype == np.uint8
        assert processor.output_size in (None, ours.shape[:2])
        assert np.array_equal(ours, theirs), shape


def test_pixels_equal_those_of_transformers_at_random_sizes():
    rng = np.random.default_rng(7)
    for seed in range(60):
        width, height, size = (int(n) for n in rng.integers((1, 1, 2), (200, 200, 90)))
        settings = {"size": {"shortest_edge": size}, "crop_pct": float(rng.uniform(0.5, 1.2))}
        image = random_image(width, height, seed)
        ours = CvtImageProcessor.from_dict(settings).to_pixels(image)
        assert np.array_equal(ours, reference_pixels(settings, image)), (image.size, settings)


@pytest.mark.parametrize("shape", [(3, 400), (400, 3), (40, 640), (500, 90)])
@pytest.mark.parametrize("name", ["224", "odd", "padded"])
def test_resizing_only_what_is_kept_equals_resizing_whole(name, shape, monkeypatch):
    processor = CvtImageProcessor.from_dict(SETTINGS[name])
    # Noise of less contrast: Pillow may choose either axis first, which shows where filters clip
    # and else by a rounding of each axis.
    image = random_image(*shape).point(lambda value: 64 + value // 2)
    whole = processor.to_pixels(image).astype(int)
    monkeypatch.setattr(image_processor, "MAX_RESIZED_PIXELS", 0)
    part = processor.to_pixels(image).astype(int)
    assert np.abs(whole - part).max() <= 2
    assert np.abs(whole - part).mean() < 0.2
    assert whole.std() > 10


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 2)])
def test_a_thread_of_pixels_is_resized_without_its_gigabytes(shape, monkeypatch):
    sizes, resize = [], Image.Image.resize

    def spy(image, size, *args, **kwargs):
        sizes.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy)
    image = random_image(*shape)
    assert CvtImageProcessor(size=224).to_pixels(image).shape == (224, 224, 3)
    assert max(width * height for width, height in sizes) <= 224 * 1000


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        {"image_mean": 0.4, "image_std": 0.2},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_normalised_tensors_equal_those_of_transformers(settings):
    settings = {"size": {"shortest_edge": 32}, **settings}
    images = [random_image(50, 40, seed) for seed in range(3)]
    theirs = ConvNextImageProcessorPil(**settings)(images, return_tensors="pt")["pixel_values"]
    processor = CvtImageProcessor.from_dict(settings)
    pixels = torch.from_numpy(np.stack([processor.to_pixels(image) for image in images]))
    ours = processor.normalize(pixels)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    half = processor.normalize(pixels, torch.bfloat16)
    assert torch.equal(half, ours.bfloat16())


def test_an_image_of_another_mode_is_refused():
    with pytest.raises(ValueError, match="mode is L, it must be RGB"):
        CvtImageProcessor().to_pixels(Image.new("L", (8, 8)))


def test_defaults_are_those_of_transformers():
    ours, theirs = CvtImageProcessor.from_dict({}), ConvNextImageProcessorPil()
    assert {"shortest_edge": ours.size} == dict(theirs.size)
    for key in CvtImageProcessor.model_fields.keys() - {"size", "do_center_crop"}:
        assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_survive_the_round_trip_and_transformers_reads_them(name, tmp_path):
    ours = CvtImageProcessor.from_dict(SETTINGS[name])
    text = json.dumps(ours.to_dict())
    assert CvtImageProcessor.from_dict(json.loads(text)) == ours
    (tmp_path / "preprocessor_config.json").write_text(text)
    theirs = ConvNextImageProcessorPil.from_pretrained(tmp_path)
    image = random_image(70, 50)
    pixels = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")
    expected = np.moveaxis(pixels["pixel_values"][0], 0, -1)
    assert np.array_equal(ours.to_pixels(image), expected)


def test_equal_settings_have_one_canonical_form():
    forms = [
        {"size": 384},
        {"size": {"shortest_edge": 384}, "crop_pct": None, "resample": 3},
        {"size": {"shortest_edge": 384, "longest_edge": 9}, "image_mean": 0.5, "_unknown": 1},
    ]
    texts = {json.dumps(CvtImageProcessor.from_dict(form).to_dict()) for form in forms}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"height": 224, "width": 224}}, 'size: .*has no "shortest_edge"'),
        ({"size": [224, 224]}, "size: "),
        ({"size": 0}, "size: .*greater than 0"),
        ({"crop_pct": -1}, "crop_pct: "),
        ({"size": 32, "crop_pct": 33}, "crop_pct: 33.0 is too large for size 32"),
        ({"resample": 7}, "resample: "),
        ({"image_mean": [0.5]}, r"image_mean\.1: "),
        ({"image_std": [1, 0, 1]}, "image_std: must not be zero"),
        ({"do_center_crop": True}, "crop_size: is missing"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size: "),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type: 'ViTImage"),
        ({"feature_extractor_type": 3}, "feature_extractor_type: 3"),
    ],
)
def test_errors_name_the_key(values, message):
    with pytest.raises(ValueError, match=message):
        CvtImageProcessor.from_dict(values)


@pytest.mark.parametrize(
    "name",
    [
        "ConvNextImageProcessor",
        "ConvNextImageProcessorFast",
        "ConvNextImageProcessorPil",
        "ConvNextFeatureExtractor",
    ],
)
def test_every_name_of_the_processor_is_known(name):
    assert CvtImageProcessor.from_dict({"image_processor_type": name}) == CvtImageProcessor()


def test_a_size_of_another_kind_is_no_matter_without_resizing():
    values = {"do_resize": False, "size": {"height": 3, "width": 4}}
    assert CvtImageProcessor.from_dict(values).output_size is None
