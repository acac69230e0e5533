"""`tf_model.h5`: a golden of TensorFlow's, files of every kind that TFCvt wrote, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from cvt_model import CheckpointError, CvtForImageClassification, CvtModel, resolve_checkpoint
from tests.tensorflow_file import keras_weights, save_tensorflow, write_h5
from tests.tiny_cvt import reference_model

GOLDEN = Path(__file__).parent / "goldens" / "tensorflow"
TOLERANCE = 1e-5
HEADLESS = "tf_cvt_model"


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def pixels():
    return torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(tmp_path):
    return save_tensorflow(tmp_path / "saved", reference_model())


def rewrite(saved, change, model=None):
    weights = keras_weights(model or reference_model(), "tf_cvt_for_image_classification")
    change(weights)
    write_h5(saved / "tf_model.h5", weights)


@pytest.mark.parametrize("source", [GOLDEN, GOLDEN / "tf_model.h5"], ids=["directory", "file"])
def test_the_golden_of_tensorflow_is_met(source):
    expected = load_file(GOLDEN / "expected.safetensors")
    classifier = CvtForImageClassification.from_pretrained(str(source))
    stages = CvtModel.from_pretrained(str(source))
    for batch in (slice(None), slice(1)):
        output, features = (model(expected["pixel_values"][batch]) for model in (classifier, stages))
        assert relative(output.logits, expected["logits"][batch]) <= TOLERANCE
        assert relative(features.last_hidden_state, expected["last_hidden_state"][batch]) <= TOLERANCE
        assert relative(features.cls_token_value, expected["cls_token_value"][batch]) <= TOLERANCE


def test_our_own_files_look_like_the_golden():
    """The files of the other tests are called and shaped as TensorFlow's."""
    config = transformers.CvtConfig(**json.loads((GOLDEN / "config.json").read_text()))
    model = transformers.CvtForImageClassification(config)
    ours = {
        name: values.shape
        for name, values in keras_weights(model, "tf_cvt_for_image_classification").items()
    }
    theirs = {}
    with h5py.File(GOLDEN / "tf_model.h5") as file:
        file.visititems(lambda name, item: theirs.update({name: getattr(item, "shape", None)}))
    assert ours == {name: shape for name, shape in theirs.items() if shape is not None}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"cls_token": [False, False, False], "qkv_bias": [False, True, False]},
        {"cls_token": [True], **{key: [value] for key, value in {
            "embed_dim": 16, "num_heads": 2, "depth": 2, "mlp_ratio": 1.5, "kernel_qkv": 5, "padding_q": 2,
            "padding_kv": 2, "patch_sizes": 7, "patch_stride": 4, "patch_padding": 2, "stride_kv": 2,
            "stride_q": 1, "qkv_bias": True, "drop_rate": 0.0, "drop_path_rate": 0.0,
            "attention_drop_rate": 0.0, "qkv_projection_method": "dw_bn",
        }.items()}},
        {"embed_dim": [48, 48, 48], "cls_token": [False, True, False]},
    ],
    ids=["plain", "no_cls", "one_stage_with_cls", "cls_in_the_middle"],
)  # fmt: skip
@pytest.mark.parametrize("model_name", ["tf_cvt_for_image_classification", "tf_cvt_again_1"])
def test_a_file_of_any_config_gives_transformers_outputs(overrides, model_name, tmp_path):
    reference = reference_model(**overrides)
    model = CvtForImageClassification.from_pretrained(str(save_tensorflow(tmp_path, reference, model_name)))
    with torch.no_grad():  # which without its hidden states cannot run where the last CLS token is absent
        expected = reference(pixels(), output_hidden_states=True).logits
    assert relative(model(pixels()).logits, expected) <= TOLERANCE
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())


def test_a_file_of_the_model_without_head_loads_as_the_model(tmp_path):
    headless = reference_model(transformers.CvtModel)
    checkpoint = resolve_checkpoint(str(save_tensorflow(tmp_path, headless, HEADLESS)))
    assert (checkpoint.num_labels, checkpoint.has_layernorm) == (0, False)
    with torch.no_grad():
        expected = headless(pixels())
    found = checkpoint.load()(pixels())
    assert relative(found.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    assert relative(found.cls_token_value, expected.cls_token_value) <= TOLERANCE
    with pytest.raises(CheckpointError, match="load it with CvtModel"):
        CvtForImageClassification.from_pretrained(str(tmp_path))


def test_weights_of_torch_are_preferred(saved):
    reference = reference_model(num_labels=5)
    reference.save_pretrained(saved)
    (saved / "tf_model.h5").write_bytes(b"never read")
    assert resolve_checkpoint(str(saved)).weight_files == (saved / "model.safetensors",)


STAGE = "cvt/tf_cvt_for_image_classification/cvt/encoder/stages.1/"


def drop(name):
    return lambda weights: weights.pop(name)


def add(weights):
    weights[STAGE + "embedding/extra/kernel:0"] = np.zeros((3, 3), np.float32)


def transpose(weights):
    name = STAGE + "layers.0/output/dense/kernel:0"
    weights[name] = weights[name].T


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop(STAGE + "layers.1/layernorm_after/beta:0"), "1 missing: {}layers.1/layernorm_after/beta:0"),
        (drop("cvt/cvt.encoder.stages.2.cls_token:0"), "1 missing: cvt/cvt.encoder.stages.2.cls_token:0"),
        (drop("classifier/tf_cvt_for_image_classification/classifier/bias:0"), "classifier/bias:0"),
        (add, "1 unexpected: {}embedding/extra/kernel:0"),
        (transpose, "{}layers.0/output/dense/kernel:0 (32, 128) instead of (128, 32)"),
    ],
)
def test_a_dataset_that_does_not_fit_is_named_as_in_the_file(saved, change, named):
    rewrite(saved, change)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(str(saved)).load()
    assert named.format(STAGE) in str(caught.value)
    assert str(saved) in str(caught.value)


def test_other_labels_than_the_classifiers_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": None}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"classifier has 5 outputs, config\.json names 3"):
        resolve_checkpoint(str(saved))


def test_two_cls_tokens_are_refused_since_the_file_holds_one(tmp_path):
    model = reference_model(embed_dim=[48, 48, 48], cls_token=[False, True, True])
    with pytest.raises(CheckpointError, match="2 stages a CLS token"):
        resolve_checkpoint(str(save_tensorflow(tmp_path, model)))


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"\x89HDF\r\n\x1a\n" + b"\x07" * 2000])
def test_garbage_is_named(saved, content):
    (saved / "tf_model.h5").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tf_model\.h5 is not a complete HDF5 file"):
        resolve_checkpoint(str(saved))


@pytest.mark.parametrize("keep", [100, 5000, -100])
def test_a_truncated_file_is_named(saved, keep):
    file = saved / "tf_model.h5"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tf_model\.h5"):
        resolve_checkpoint(str(saved)).load()


def test_a_dataset_kept_in_another_file_is_refused(saved, tmp_path):
    (tmp_path / "secret").write_bytes(b"1234" * 5)
    name = "classifier/tf_cvt_for_image_classification/classifier/bias:0"
    with h5py.File(saved / "tf_model.h5", "a") as file:
        del file[name]
        file.create_dataset(name, (5,), "f4", external=[(str(tmp_path / "secret"), 0, 20)])
    with pytest.raises(CheckpointError, match="no array of floats in this file"):
        resolve_checkpoint(str(saved))


def test_a_link_to_another_file_is_not_followed(saved, tmp_path):
    shutil.copy(saved / "tf_model.h5", tmp_path / "other.h5")
    name = "classifier/tf_cvt_for_image_classification/classifier/bias:0"
    with h5py.File(saved / "tf_model.h5", "a") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(tmp_path / "other.h5"), name)
    with pytest.raises(CheckpointError, match=r"1 missing: .*classifier/bias:0"):
        resolve_checkpoint(str(saved)).load()


def test_a_missing_h5py_is_told_with_the_command_that_installs_it(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CheckpointError, match=r"pip install 'cvt-pipeline\[tensorflow\]'"):
        resolve_checkpoint(str(saved))
