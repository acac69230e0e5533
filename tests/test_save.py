"""Saving: what we write loads in transformers, and what transformers writes loads here, bit for bit."""

import json
import os

import pytest
import torch
import transformers
from safetensors import safe_open

from cvt_model import (
    CheckpointError,
    CvtConfig,
    CvtForImageClassification,
    CvtImageProcessor,
    CvtModel,
    resolve_checkpoint,
)
from cvt_model.save import differences_in_transformers, save_checkpoint
from tests.tiny_cvt import TINY, reference_model

PROCESSOR = CvtImageProcessor(size=32, crop_pct=0.9, image_mean=(0.1, 0.2, 0.3))
FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def pixels():
    return torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(3))


def ours(tmp_path, model_class=CvtForImageClassification, **overrides):
    """A network of ours with random weights: those of a reference that transformers saved."""
    reference_class = getattr(transformers, model_class.__name__)
    reference = reference_model(reference_class, **overrides)
    reference.save_pretrained(tmp_path / "theirs")
    return model_class.from_pretrained(str(tmp_path / "theirs")), reference


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_labels": 0},
        {"num_labels": 2, "id2label": {0: "cat", 1: "é"}, "label2id": {"cat": 0, "é": 1}},
        {"embed_dim": [48, 48, 48], "cls_token": [True, False, True], "qkv_bias": [True, False, True]},
    ],
    ids=["plain", "no_classes", "labels", "cls_tokens"],
)
def test_transformers_reads_what_we_write_and_we_what_it_writes(overrides, tmp_path):
    model, reference = ours(tmp_path, **overrides)
    save_checkpoint(tmp_path / "ours", model, PROCESSOR)
    theirs, info = transformers.CvtForImageClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.id2label == reference.config.id2label
    assert theirs.dtype == torch.float32
    state, expected = theirs.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    again = CvtForImageClassification.from_pretrained(str(tmp_path / "ours"))
    with torch.no_grad():
        logits = theirs.eval()(pixels()).logits
    assert (again(pixels()).logits - logits).abs().max() <= 1e-5
    assert again.config == model.config


def test_the_model_without_head_goes_both_ways(tmp_path):
    model, reference = ours(tmp_path, CvtModel)
    save_checkpoint(tmp_path / "ours", model)
    theirs, info = transformers.CvtModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == ["CvtModel"]
    with torch.no_grad():
        expected = theirs.eval()(pixels()).cls_token_value
        assert torch.equal(expected, reference(pixels()).cls_token_value)
    again = CvtModel.from_pretrained(str(tmp_path / "ours"))
    assert (again(pixels()).cls_token_value - expected).abs().max() <= 1e-5


def test_the_preprocessing_goes_both_ways(tmp_path):
    model, _ = ours(tmp_path)
    files = save_checkpoint(tmp_path / "ours", model, PROCESSOR)
    assert sorted(file.name for file in files) == FILES
    assert resolve_checkpoint(str(tmp_path / "ours")).processor == PROCESSOR
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert dict(theirs.size) == {"shortest_edge": 32}
    assert (theirs.crop_pct, tuple(theirs.image_mean)) == (0.9, (0.1, 0.2, 0.3))


def test_without_preprocessing_the_network_is_saved_alone(tmp_path):
    model, _ = ours(tmp_path)
    save_checkpoint(tmp_path / "ours", model)
    assert names_in(tmp_path / "ours") == FILES[:2]
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        _ = resolve_checkpoint(str(tmp_path / "ours")).processor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(tmp_path, dtype):
    model, _ = ours(tmp_path)
    save_checkpoint(tmp_path / "ours", model.to(dtype))
    assert transformers.CvtForImageClassification.from_pretrained(tmp_path / "ours").dtype == dtype
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("layernorm.weight").dtype == dtype


def test_weights_in_any_memory_order_are_saved(tmp_path):
    model, reference = ours(tmp_path)
    save_checkpoint(tmp_path / "ours", model.to(memory_format=torch.channels_last))
    again = CvtForImageClassification.from_pretrained(str(tmp_path / "ours"))
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())


def test_files_are_readable_by_others_and_nothing_else_is_left(tmp_path):
    model, _ = ours(tmp_path)
    before = os.umask(0o022)
    try:
        save_checkpoint(tmp_path / "ours", model, PROCESSOR)
    finally:
        os.umask(before)
    assert names_in(tmp_path / "ours") == FILES
    assert {(tmp_path / "ours" / name).stat().st_mode & 0o777 for name in FILES} == {0o644}


@pytest.mark.parametrize("name", FILES[:2])
def test_a_failing_disk_leaves_the_older_file_whole(tmp_path, monkeypatch, name):
    model, _ = ours(tmp_path)
    save_checkpoint(tmp_path / "ours", model)
    before = (tmp_path / "ours" / name).read_bytes()

    def fail(path, *_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(f"cvt_model.save.write_{'json' if name == FILES[0] else 'weights'}", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "ours", model)
    assert (tmp_path / "ours" / name).read_bytes() == before
    assert names_in(tmp_path / "ours") == FILES[:2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"hidden_act": "quick_gelu"}, ["exact GELU"]),
        ({"qkv_projection_method": ["avg", "dw_bn", "linear"]}, ["avg and linear"]),
        ({"cls_token": [False, True, True]}, ["own width"]),
        ({"depth": [1, 1, 3], "hidden_act": "quick_gelu"}, ["exact GELU", "more layers"]),
    ],
)
def test_what_transformers_does_otherwise_is_known(changes, words):
    found = differences_in_transformers(CvtConfig(**{**TINY, **changes}))
    assert len(found) == len(words)
    for difference, word in zip(found, words, strict=True):
        assert word in difference
