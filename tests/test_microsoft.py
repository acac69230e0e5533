"""The original authors' `.pth` files: goldens of theirs, their network written again, refusals."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cvt_model import CheckpointError, CvtForImageClassification, CvtModel, resolve_checkpoint
from cvt_model.microsoft import infer_config
from cvt_model.presets import ARCHITECTURES
from tests.original_cvt import OriginalCvt, make_spec, write_pth

GOLDENS = Path(__file__).parent / "goldens" / "microsoft"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.pth"))
TOLERANCE = 1e-5

SPECS = {
    "one_stage_without_cls": {
        "num_stages": 1, "num_classes": 3,
        **{key: value[:1] for key, value in make_spec()["MODEL"]["SPEC"].items() if type(value) is list},
    },
    "avg_with_cls_and_padding": {
        "qkv_proj_method": ["avg", "dw_bn", "avg"], "kernel_qkv": [3, 3, 2], "padding_kv": [1, 1, 0],
    },
    "large_kernels_no_biases": {
        "kernel_qkv": [5, 3, 1], "padding_q": [2, 1, 0], "padding_kv": [2, 0, 0], "stride_kv": [1, 2, 2],
        "qkv_bias": [False, True, False],
    },
    "cls_in_every_stage": {"cls_token": [True, True, True], "patch_size": [5, 2, 3]},
    "odd_mlp_no_classes": {"mlp_ratio": [29 / 8, 1.1, 2.0], "num_classes": 0},
}  # fmt: skip


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_of_the_original_network_is_met(name):
    expected = load_file(GOLDENS / f"{name}.expected.safetensors")
    model = CvtForImageClassification.from_pretrained(str(GOLDENS / f"{name}.pth"))
    for batch in (slice(None), slice(1)):
        output = model(expected["pixel_values"][batch])
        assert relative(output.logits, expected["logits"][batch]) <= TOLERANCE
        assert relative(output.embedding, expected["features"][batch]) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_network_written_again_meets_the_goldens(name):
    """The oracle of the other tests is itself held to the original."""
    oracle = OriginalCvt(json.loads((GOLDENS / f"{name}.json").read_text()))
    oracle.load_state_dict(torch.load(GOLDENS / f"{name}.pth", weights_only=True))
    expected = load_file(GOLDENS / f"{name}.expected.safetensors")
    assert relative(oracle(expected["pixel_values"]), expected["logits"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["dw_bn", "no_bias_mixed", "no_cls"])
def test_a_golden_without_its_spec_is_inferred_with_one_warning(name, tmp_path, caplog):
    weights = Path(shutil.copy(GOLDENS / f"{name}.pth", tmp_path))
    with caplog.at_level(logging.WARNING):
        model = CvtForImageClassification.from_pretrained(str(weights))
    expected = load_file(GOLDENS / f"{name}.expected.safetensors")
    assert relative(model(expected["pixel_values"]).logits, expected["logits"]) <= TOLERANCE
    (record,) = caplog.records
    for part in (str(weights), "num_heads (1, 2, 3)", "stride_kv (2, 2, 2)", f"as {name}.yaml"):
        assert part in record.getMessage()


def test_all_that_tensors_tell_is_inferred(tmp_path):
    spec_file = make_spec(
        kernel_qkv=[5, 3, 1], padding_q=[2, 1, 0], padding_kv=[2, 1, 0], mlp_ratio=[29 / 8, 1.1, 3.3],
        qkv_bias=[False, True, False], cls_token=[False, True, True], depth=[2, 1, 3], num_classes=0,
    )  # fmt: skip
    oracle = OriginalCvt(spec_file)
    weights = write_pth(tmp_path, spec_file, oracle.state_dict(), spec_suffix="")
    pixels = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    model = CvtForImageClassification.from_pretrained(str(weights))
    assert relative(model(pixels).embedding, oracle.features(pixels)) <= TOLERANCE


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_any_spec_gives_the_originals_outputs(name, suffix, tmp_path):
    spec_file = make_spec(**SPECS[name])
    oracle = OriginalCvt(spec_file)
    checkpoint = resolve_checkpoint(str(write_pth(tmp_path, spec_file, oracle.state_dict(), "x", suffix)))
    pixels = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    output = checkpoint.load()(pixels)
    assert checkpoint.num_labels == spec_file["MODEL"]["NUM_CLASSES"]
    assert relative(output.embedding, oracle.features(pixels)) <= TOLERANCE
    assert relative(output.logits, oracle(pixels)) <= TOLERANCE


def test_the_stages_alone_can_be_loaded(tmp_path):
    spec_file = make_spec()
    oracle = OriginalCvt(spec_file)
    model = CvtModel.from_pretrained(str(write_pth(tmp_path, spec_file, oracle.state_dict())))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    cls = model(pixels).cls_token_value
    assert relative(oracle.norm(cls).squeeze(1), oracle.features(pixels)) <= TOLERANCE


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "model": "cls_cvt", "perf": 0.8},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {key: value.half() for key, value in state.items()},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    ],
    ids=["state_dict", "model", "module", "both", "half", "no_counters"],
)
def test_what_training_scripts_put_around_weights_is_taken_off(wrap, tmp_path):
    spec_file = make_spec()
    oracle = OriginalCvt(spec_file)
    model = resolve_checkpoint(str(write_pth(tmp_path, spec_file, wrap(oracle.state_dict())))).load()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert relative(model(pixels).logits, oracle(pixels)) <= 2e-2
    assert model.classifier.weight.dtype == torch.float32


def drop(key):
    return lambda state: state.pop(key)


def add(state):
    state["stage1.pos_embed"] = torch.zeros(1, 4, 16)


def transpose(state):
    state["stage2.blocks.1.mlp.fc2.weight"] = state["stage2.blocks.1.mlp.fc2.weight"].T.contiguous()


@pytest.mark.parametrize("with_spec", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("stage1.blocks.0.attn.proj_q.bias"), "stage1.blocks.0.attn.proj_q.bias"),
        (drop("stage0.patch_embed.proj.weight"), "stage0.patch_embed.proj.weight"),
        (drop("stage2.blocks.1.mlp.fc1.weight"), "1 missing: stage2.blocks.1.mlp.fc1.weight"),
        (drop("stage0.blocks.0.attn.conv_proj_v.bn.running_var"), "attn.conv_proj_v.bn.running_var"),
        (drop("norm.bias"), "1 missing: norm.bias"),
        (drop("head.bias"), "1 missing: head.bias"),
        (add, "1 unexpected: stage1.pos_embed"),
        (transpose, r"stage2.blocks.1.mlp.fc2.weight (96, 24) instead of (24, 96)"),
    ],
)
def test_a_key_that_does_not_fit_is_named_as_in_the_file(change, named, with_spec, tmp_path):
    spec_file = make_spec()
    state = OriginalCvt(spec_file).state_dict()
    change(state)
    weights = write_pth(tmp_path, spec_file, state, spec_suffix=".json" if with_spec else "")
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(str(weights)).load()
    assert named in str(caught.value)
    assert str(weights) in str(caught.value)
    assert "cvt.encoder" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec_file", "message"),
    [
        (make_spec(qkv_proj_method=["avg"] * 3), "stage0.blocks.0 has no convolutions for queries"),
        (make_spec(qkv_proj_method=["dw_bn", "avg", "dw_bn"]), "stage1.blocks.0 has no convolutions"),
        (make_spec(patch_size=[5, 3, 3]), "patch embedding of 5 x 5"),
        (make_spec(kernel_qkv=[3, 2, 3]), "padding_q"),
    ],
)
def test_what_tensors_cannot_tell_is_asked_for(spec_file, message, tmp_path):
    weights = write_pth(tmp_path, spec_file, spec_suffix="")
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_checkpoint(str(weights))
    assert "put the YAML or JSON spec" in str(caught.value)
    assert "as tiny.yaml" in str(caught.value)


@pytest.mark.parametrize("name", ["cvt-13", "cvt-21", "cvt-w24-384-22k"])
def test_a_published_model_is_recognised_without_a_warning(name, tmp_path, caplog):
    known = ARCHITECTURES[name].config
    fields = {"dim_embed": known.embed_dim, "num_heads": known.num_heads, "depth": known.depth}
    spec_file = make_spec(**{key: list(value) for key, value in fields.items()}, num_classes=21841)
    with torch.device("meta"):
        state = OriginalCvt(spec_file, randomise=False).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    with caplog.at_level(logging.WARNING):
        config = infer_config(tmp_path / "x.pth", shapes)
    assert not caplog.records
    assert (config.num_heads, config.stride_kv) == (known.num_heads, known.stride_kv)
    assert (config.num_labels, config.hidden_act) == (21841, "quick_gelu")


def test_a_published_model_that_lacks_its_cls_token_is_refused(tmp_path):
    """Inferred alone it would be a network without one."""
    fields = {"dim_embed": [64, 192, 384], "num_heads": [1, 3, 6], "depth": [1, 2, 10]}
    state = OriginalCvt(make_spec(**fields)).state_dict()
    del state["stage2.cls_token"]
    weights = write_pth(tmp_path, {}, state, spec_suffix="")
    with pytest.raises(CheckpointError, match=r"1 missing: stage2\.cls_token"):
        resolve_checkpoint(str(weights)).load()


class Malice:
    def __reduce__(self):
        return (os.mkdir, (os.environ["MALICE"],))


def test_a_file_with_code_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MALICE", str(tmp_path / "was_run"))
    for state in (Malice(), {"state_dict": {"head.weight": Malice()}}):
        weights = write_pth(tmp_path, make_spec(), state)
        with pytest.raises(CheckpointError, match="could run code"):
            resolve_checkpoint(str(weights))
        assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("keep", [0, 5, 3000, -100])
def test_a_truncated_file_is_named(keep, tmp_path):
    weights = write_pth(tmp_path, make_spec())
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny\.pth"):
        resolve_checkpoint(str(weights))


@pytest.mark.parametrize("state", [{}, [1], {"state_dict": {"a": 3}}, {"layer.weight": torch.zeros(2)}])
def test_a_file_of_something_else_is_named(state, tmp_path):
    weights = write_pth(tmp_path, make_spec(), state, spec_suffix="")
    with pytest.raises(CheckpointError, match=r"tiny\.pth"):
        resolve_checkpoint(str(weights))
