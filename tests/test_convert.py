"""`convert`: checkpoints of every layout end in the Hub's layout with the same outputs."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from cvt_model import CvtForImageClassification, CvtModel, resolve_checkpoint
from pipeline.convert import convert
from pipeline.errors import ConfigError, OutputError
from tests.running import cli
from tests.tensorflow_file import save_tensorflow
from tests.tiny_cvt import reference_model

GOLDENS = Path(__file__).parent / "goldens"
SOURCES = [*sorted(GOLDENS.glob("microsoft/*.pth")), GOLDENS / "tensorflow"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_golden_still_is_met_after_conversion(source, tmp_path):
    file = source / "expected" if source.is_dir() else source.with_suffix(".expected")
    expected = load_file(f"{file}.safetensors")
    written = convert(str(source), tmp_path / "new")
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    model = CvtForImageClassification.from_pretrained(str(tmp_path / "new"))
    logits = model(expected["pixel_values"]).logits
    assert (logits - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()


def test_the_golden_of_tensorflow_runs_in_transformers_after_conversion(tmp_path):
    convert(str(GOLDENS / "tensorflow"), tmp_path / "new")
    model, info = transformers.CvtForImageClassification.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(info.values()), info
    expected = load_file(GOLDENS / "tensorflow" / "expected.safetensors")
    with torch.no_grad():
        logits = model.eval()(expected["pixel_values"]).logits
    assert (logits - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()


def test_labels_preprocessing_and_a_missing_head_are_carried_over(tmp_path):
    headless = reference_model(transformers.CvtModel)
    save_tensorflow(tmp_path / "old", headless, "tf_cvt_model")
    settings = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}}
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(settings))
    convert(str(tmp_path / "old"), tmp_path / "new")
    checkpoint = resolve_checkpoint(str(tmp_path / "new"))
    assert isinstance(checkpoint.load(), CvtModel)
    assert checkpoint.processor.size == 48
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    full = reference_model(num_labels=2, **labels)
    convert(str(save_tensorflow(tmp_path / "full", full)), tmp_path / "labels")
    assert resolve_checkpoint(str(tmp_path / "labels")).config.id2label == {0: "cat", 1: "dog"}


def test_a_built_in_model_can_be_written(tmp_path):
    convert("cvt-tiny-random", tmp_path / "new")
    before, after = (resolve_checkpoint(source) for source in ("cvt-tiny-random", str(tmp_path / "new")))
    assert (before.config, before.processor) == (after.config, after.processor)
    state = after.load().state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.load().state_dict().items())


def test_what_is_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(OutputError, match="is not an empty directory"):
            convert("cvt-tiny-random", tmp_path / name)
    assert list((tmp_path / "full").iterdir()) == [tmp_path / "full" / "notes.txt"]
    with pytest.raises(OutputError, match="cannot write"):
        convert("cvt-tiny-random", tmp_path / "file" / "inside")


def test_a_bad_source_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"SRC: .*no such file or directory"):
        convert("./nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_verb_says_what_it_wrote_and_what_transformers_would_compute_otherwise(tmp_path):
    done = cli("convert", GOLDENS / "microsoft" / "avg.pth", tmp_path / "new")
    assert (done.returncode, done.stdout) == (0, "")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert f"wrote {tmp_path / 'new' / name}" in done.stderr
    for word in ("exact GELU", "qkv_projection_method is avg", "depth is (1, 2, 2)"):
        assert word in done.stderr
    again = cli("convert", GOLDENS / "tensorflow", tmp_path / "new")
    assert again.returncode == 2
    assert "is not an empty directory" in again.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_can_be_written_in_half_their_bytes(dtype, tmp_path):
    convert("cvt-tiny-random", tmp_path / "whole")
    convert("cvt-tiny-random", tmp_path / "half", dtype)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert 0.45 < sizes[1] / sizes[0] < 0.56
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype
    pixels = torch.randn(2, 3, 64, 64)
    logits = [resolve_checkpoint(str(tmp_path / name)).load()(pixels).logits for name in ("whole", "half")]
    assert (logits[0] - logits[1]).abs().max() < 0.02 * logits[0].abs().max()
    with pytest.raises(ConfigError, match=r"--dtype: a \.onnx file is written in float32"):
        convert("cvt-tiny-random", tmp_path / "x.onnx", dtype)
