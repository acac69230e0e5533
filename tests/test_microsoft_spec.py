"""The original authors' specs: the classes and the evaluation transform that they name, and bad ones."""

import copy
import json
import logging

import pytest
import yaml

from cvt_model import CheckpointError, resolve_checkpoint
from tests.original_cvt import OriginalCvt, make_spec, write_pth


def test_a_spec_with_other_classes_than_the_weights_is_refused(tmp_path):
    state = OriginalCvt(make_spec(num_classes=5)).state_dict()
    for num_classes, named in ((0, "2 unexpected: head"), (4, "head.weight (5, 24) instead of (4, 24)")):
        weights = write_pth(tmp_path, make_spec(num_classes=num_classes), state)
        with pytest.raises(CheckpointError) as caught:
            resolve_checkpoint(str(weights)).load()
        assert named in str(caught.value)
        assert "do not fit tiny.json" in str(caught.value)


def test_a_spec_that_names_no_classes_takes_the_weights(tmp_path):
    spec_file = make_spec(num_classes=7)
    weights = write_pth(tmp_path, spec_file, spec_suffix="")
    del spec_file["MODEL"]["NUM_CLASSES"]
    weights.with_suffix(".yaml").write_text(yaml.safe_dump(spec_file))
    assert resolve_checkpoint(str(weights)).num_labels == 7


PROCESSOR_CASES = [
    ("x", {}, (224, 0.875, 3)),
    ("CvT-13-384x384-IN-22k", {}, (384, 0.875, 3)),
    ("CvT-13-224x224-IN-1k", {}, (224, 0.875, 3)),
    ("CvT-384x384", {"TEST": {"IMAGE_SIZE": [224, 224], "INTERPOLATION": 2}}, (224, 0.875, 2)),
    ("x", {"TEST": {"IMAGE_SIZE": [384, 384], "CENTER_CROP": False}}, (384, 0.875, 3)),
    ("x", {"TRAIN": {"IMAGE_SIZE": [384, 384]}}, (384, 0.875, 3)),
]


@pytest.mark.parametrize(("name", "sections", "expected"), PROCESSOR_CASES)
def test_images_are_prepared_as_the_original_evaluates(name, sections, expected, tmp_path):
    checkpoint = resolve_checkpoint(str(write_pth(tmp_path, make_spec() | sections, name=name)))
    processor = checkpoint.processor
    assert (processor.size, processor.crop_pct, processor.resample) == expected
    assert processor.image_mean == (0.485, 0.456, 0.406)
    assert processor.output_size == (expected[0], expected[0])


def test_the_specs_mean_and_deviation_are_used(tmp_path):
    spec_file = make_spec() | {"INPUT": {"MEAN": [0.1, 0.2, 0.3], "STD": [0.4, 0.5, 0.6]}}
    processor = resolve_checkpoint(str(write_pth(tmp_path, spec_file))).processor
    assert (processor.image_mean, processor.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"TEST": {"IMAGE_SIZE": [224, 320]}}, "no square"),
        ({"TEST": {"IMAGE_SIZE": [224, 224], "CENTER_CROP": False}}, "CENTER_CROP: False at 224"),
        ({"TEST": {"IMAGE_SIZE": [384, 384], "CENTER_CROP": True}}, "CENTER_CROP: True at 384"),
        ({"TEST": {"INTERPOLATION": 17}}, "resample"),
    ],
)
def test_a_transform_that_we_lack_is_told_to_whom_prepares_images(sections, message, tmp_path):
    checkpoint = resolve_checkpoint(str(write_pth(tmp_path, make_spec() | sections)))
    assert checkpoint.load().config.num_labels == 5
    with pytest.raises(CheckpointError, match=message):
        _ = checkpoint.processor


def without(key):
    spec_file = copy.deepcopy(make_spec())
    del spec_file["MODEL"]["SPEC"][key]
    return spec_file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "neither readable YAML nor JSON"),
        ("[]", "MODEL.SPEC is missing"),
        ('{"MODEL": {"NAME": "x"}}', "MODEL.SPEC is missing"),
        ('{"MODEL": 3}', "MODEL must be a mapping"),
        (json.dumps({"BASE": ["base.yaml"], **make_spec()}), "BASE names other files"),
        (json.dumps(without("STRIDE_KV")), "lacks STRIDE_KV"),
        (json.dumps(make_spec(depth=[1, 2])), r"DEPTH has 2 entries for 3"),
        (json.dumps(make_spec(num_heads=[3, 2, 3])), "NUM_HEADS: DIM_EMBED 8 of stage 0"),
        (json.dumps(make_spec(qkv_proj_method=["x"] * 3)), "QKV_PROJ_METHOD"),
        (json.dumps(make_spec(num_classes="x")), "NUM_CLASSES"),
    ],
)
def test_a_bad_spec_is_named_in_its_own_words(text, message, tmp_path):
    weights = write_pth(tmp_path, make_spec(), spec_suffix="")
    weights.with_suffix(".json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_checkpoint(str(weights))
    assert str(weights.with_suffix(".json")) in str(caught.value)


def test_an_unknown_key_of_the_spec_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        resolve_checkpoint(str(write_pth(tmp_path, make_spec(window_size=[7, 7, 7]))))
    assert "WINDOW_SIZE" in caplog.text
