"""Finding, checking and loading of checkpoints, written by transformers and torch."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cvt_model import (
    CheckpointError,
    CvtConfig,
    CvtForImageClassification,
    CvtModel,
    resolve_checkpoint,
)
from cvt_model.checkpoint import Checkpoint
from cvt_model.presets import PRESETS
from pipeline.errors import ConfigError
from pipeline.prepare import find_checkpoint
from tests.running import make_config
from tests.saved_cvt import assert_loads_as, pixels, reference, saved
from tests.tiny_cvt import reference_model, save_checkpoint

__all__ = ["reference", "saved"]  # fixtures

REPO = Path(__file__).parents[1]


def rewrite_as_bin(directory, reference, **options):
    (directory / "model.safetensors").unlink()
    torch.save(reference.state_dict(), directory / "pytorch_model.bin", **options)


def rewrite_weights(directory, change):
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_safetensors_load(saved, reference):
    checkpoint = resolve_checkpoint(str(saved))
    assert checkpoint.weight_files == (saved / "model.safetensors",)
    assert (checkpoint.num_labels, checkpoint.has_layernorm) == (5, True)
    assert checkpoint.config.id2label[4] == "LABEL_4"
    assert checkpoint.processor.output_size == (32, 32)
    assert_loads_as(reference, saved)


def test_sharded_safetensors_load(tmp_path, reference):
    save_checkpoint(tmp_path, reference, max_shard_size="100KB")
    assert len(resolve_checkpoint(str(tmp_path)).weight_files) > 2
    assert_loads_as(reference, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_of_either_format_load(saved, reference, zipped):
    rewrite_as_bin(saved, reference, _use_new_zipfile_serialization=zipped)
    assert_loads_as(reference, saved)


def test_sharded_bin_files_load(saved, reference):
    (saved / "model.safetensors").unlink()
    state = reference.state_dict()
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    shards = [dict(list(state.items())[:50]), dict(list(state.items())[50:])]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, saved / name)
    weight_map = {key: names[i] for i, shard in enumerate(shards) for key in shard}
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_loads_as(reference, saved)


def test_safetensors_are_preferred_to_a_pickle(saved, reference):
    (saved / "pytorch_model.bin").write_bytes(b"never read")
    assert_loads_as(reference, saved)


def test_a_headless_checkpoint_loads_as_the_model(tmp_path):
    headless = save_checkpoint(tmp_path, reference_model(transformers.CvtModel))
    checkpoint = resolve_checkpoint(str(tmp_path))
    assert (checkpoint.num_labels, checkpoint.has_layernorm) == (0, False)
    model = checkpoint.load()
    assert isinstance(model, CvtModel)
    with torch.no_grad():
        expected = headless(pixels()).cls_token_value
    assert (model(pixels()).cls_token_value - expected).abs().max() <= 1e-5
    with pytest.raises(CheckpointError, match=r"no final LayerNorm.*load it with CvtModel"):
        CvtForImageClassification.from_pretrained(str(tmp_path))


def test_the_model_takes_the_stages_of_a_full_checkpoint(saved, reference):
    model = CvtModel.from_pretrained(str(saved))
    with torch.no_grad():
        expected = reference.cvt(pixels()).last_hidden_state
    assert (model(pixels()).last_hidden_state - expected).abs().max() <= 1e-5


def test_a_checkpoint_without_classifier_gives_embeddings_only(tmp_path):
    save_checkpoint(tmp_path, reference_model(num_labels=0))
    checkpoint = resolve_checkpoint(str(tmp_path))
    assert (checkpoint.num_labels, checkpoint.has_layernorm) == (0, True)
    output = checkpoint.load()(pixels())
    assert torch.equal(output.logits, output.embedding)


def test_a_loaded_model_is_ready_for_inference(saved):
    model = CvtForImageClassification.from_pretrained(str(saved), dtype=torch.bfloat16)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())  # as transformers has it
    inference = resolve_checkpoint(str(saved)).load()
    assert not any(parameter.requires_grad for parameter in inference.parameters())
    for name, tensor in model.state_dict().items():
        counter = name.endswith("num_batches_tracked")
        assert tensor.dtype == (torch.int64 if counter else torch.bfloat16), name
    assert model(pixels().bfloat16()).logits.isfinite().all()


def test_a_loaded_model_outlives_its_file(saved, reference):
    model = CvtForImageClassification.from_pretrained(str(saved))
    size = (saved / "model.safetensors").stat().st_size
    with (saved / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    with torch.no_grad():
        assert (model(pixels()).logits - reference(pixels()).logits).abs().max() <= 1e-5


def test_absent_step_counters_are_tolerated(saved, reference):
    def drop_counters(state):
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]

    rewrite_weights(saved, drop_counters)
    assert_loads_as(reference, saved)


def test_keys_that_do_not_fit_are_all_listed(saved):
    def change(state):
        del state["layernorm.weight"]
        state["cvt.extra"] = torch.zeros(2)
        state["classifier.bias"] = torch.zeros(7)

    rewrite_weights(saved, change)
    checkpoint = resolve_checkpoint(str(saved))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load()
    message = str(caught.value)
    assert str(saved) in message
    assert "1 missing: layernorm.weight" in message
    assert "1 unexpected: cvt.extra" in message
    assert "1 of another shape: classifier.bias (7,) instead of (5,)" in message


def test_many_keys_that_do_not_fit_are_counted_and_cut(saved):
    edit_json(saved / "config.json", depth=[1, 2, 5])
    with pytest.raises(CheckpointError, match=r"(\d+) missing: .* and \d+ more") as caught:
        resolve_checkpoint(str(saved)).load()
    assert len(str(caught.value)) < 1500


def test_a_classifier_that_contradicts_the_labels_is_refused_before_loading(saved):
    edit_json(saved / "config.json", id2label={"0": "a", "1": "b"}, label2id=None)
    with pytest.raises(CheckpointError, match=r"classifier has 5 outputs, config.json names 2"):
        resolve_checkpoint(str(saved))


class Malice:
    def __reduce__(self):
        return (os.mkdir, (os.environ["MALICE"],))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_never_run(saved, tmp_path, monkeypatch, zipped):
    monkeypatch.setenv("MALICE", str(tmp_path / "was_run"))
    (saved / "model.safetensors").unlink()
    state = {"layernorm.weight": Malice()}
    torch.save(state, saved / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="could run code"):
        resolve_checkpoint(str(saved))
    assert not (tmp_path / "was_run").exists()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(state))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        resolve_checkpoint(str(saved))
    assert not (tmp_path / "was_run").exists()


def test_a_pickle_of_more_than_tensors_is_refused(saved):
    (saved / "model.safetensors").unlink()
    torch.save({"epoch": 3, "state_dict": {}}, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors by name"):
        resolve_checkpoint(str(saved))


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_weight_file_is_named(saved, reference, keep, kind):
    if kind == "bin":
        rewrite_as_bin(saved, reference)
    file = saved / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=file.name):
        resolve_checkpoint(str(saved))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"config\.json is not readable JSON"),
        ("config.json", "[]", r"config\.json must hold a JSON object"),
        ("config.json", '{"model_type": "vit"}', r"config\.json: model_type: is 'vit'"),
        ("config.json", '{"depth": [1]}', r"config\.json: patch_sizes: has 3 entries"),
        ("config.json", None, r"not a checkpoint: it has no config\.json"),
        ("model.safetensors", None, r"holds no weights: none of model\.safetensors"),
    ],
)
def test_a_file_that_is_missing_or_wrong_is_named(saved, file, text, message):
    if text is None:
        (saved / file).unlink()
    else:
        (saved / file).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(str(saved))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no preprocessor_config\.json.*copy it from"),
        ('{"resample": 9}', r"preprocessor_config\.json: resample"),
        ("\xff", r"preprocessor_config\.json is not readable JSON"),
    ],
)
def test_only_who_prepares_images_needs_the_preprocessing(saved, reference, text, message):
    (saved / "preprocessor_config.json").unlink()
    if text is not None:
        (saved / "preprocessor_config.json").write_text(text, encoding="latin-1")
    assert_loads_as(reference, saved)
    with pytest.raises(CheckpointError, match=message):
        _ = resolve_checkpoint(str(saved)).processor
    with pytest.raises(ConfigError, match=message):
        find_checkpoint(make_config("in", saved, "out"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-1.safetensors"}}, "lacks model-1.safetensors"),
        ({"weight_map": {"a": "../model.safetensors"}}, "a file beside it"),
        ({"metadata": {}}, "weight_map"),
    ],
)
def test_a_broken_index_is_named(saved, index, message):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(str(saved))


def test_the_processor_may_stand_in_a_combined_file(saved):
    settings = json.loads((saved / "preprocessor_config.json").read_text())
    expected = resolve_checkpoint(str(saved)).processor
    (saved / "preprocessor_config.json").unlink()
    (saved / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert resolve_checkpoint(str(saved)).processor == expected


def test_the_hash_covers_names_and_contents_and_nothing_else(saved):
    def hash_now():
        return resolve_checkpoint(str(saved)).weights_sha256

    before = hash_now()
    edit_json(saved / "config.json", architectures=["X"])
    shutil.copytree(saved, saved.parent / "copy")
    assert hash_now() == before == resolve_checkpoint(str(saved.parent / "copy")).weights_sha256
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x99")
    changed = hash_now()
    assert changed != before
    weights.write_bytes(b"")
    save_checkpoint(saved, max_shard_size="100KB")
    weights.unlink()
    assert hash_now() not in (before, changed)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "no such model", ""])
def test_what_is_neither_directory_nor_hub_id_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        resolve_checkpoint(source)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_weight_file_stands_for_its_directory(saved, reference, kind):
    if kind == "bin":
        rewrite_as_bin(saved, reference)
    file = saved / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    checkpoint = resolve_checkpoint(str(file))
    assert checkpoint.path == file
    assert checkpoint.weights_sha256 == resolve_checkpoint(str(saved)).weights_sha256
    assert checkpoint.processor == resolve_checkpoint(str(saved)).processor
    assert_loads_as(reference, file)
    assert resolve_checkpoint(file).source == str(file)


def test_a_run_finds_a_weight_file_from_any_directory(saved, monkeypatch):
    monkeypatch.chdir(saved)
    checkpoint = find_checkpoint(make_config("in", "model.safetensors", "out"))
    assert checkpoint.source == str(saved / "model.safetensors")


def test_a_file_that_holds_no_weights_is_refused_with_a_remedy(saved):
    with pytest.raises(CheckpointError, match="is no weight file by its name; give a"):
        resolve_checkpoint(str(saved / "config.json"))
    (saved.parent / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        resolve_checkpoint(str(saved.parent / "model.safetensors"))


def test_resolving_imports_no_torch_and_importing_no_transformers(saved):
    code = (
        "import sys, cvt_model, cvt_model.checkpoint, cvt_model.config, cvt_model.image_processor\n"
        "for source in (sys.argv[1], 'cvt-tiny-random'):\n"
        "    cvt_model.resolve_checkpoint(source)\n"
        "print('torch' in sys.modules)\n"
        "cvt_model.CvtForImageClassification.from_pretrained(sys.argv[1])\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)],
        env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True", "False"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_built_in_model_is_the_same_whatever_the_global_seed(name):
    checkpoint = resolve_checkpoint(name)
    assert isinstance(checkpoint, Checkpoint)
    torch.manual_seed(1)
    first = checkpoint.load().state_dict()
    torch.manual_seed(2)
    second = CvtForImageClassification.from_pretrained(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    headless = CvtModel.from_pretrained(name).state_dict()
    assert all(torch.equal(first["cvt." + key], headless[key]) for key in headless)
    weight = first["cvt.encoder.stages.0.embedding.convolution_embeddings.projection.weight"]
    std = PRESETS[name].config.initializer_range
    assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_built_in_weights_never_change_unnoticed():
    """Embeddings that users stored depend on these; a change needs a new recipe number."""
    preset = PRESETS["cvt-tiny-random"]
    generator = torch.Generator().manual_seed(preset.seed)
    state = resolve_checkpoint("cvt-tiny-random").load().state_dict()
    first = state["cvt.encoder.stages.0.embedding.convolution_embeddings.projection.weight"]
    uniform = torch.rand(first.shape, generator=generator)
    half_width = preset.config.initializer_range * 3**0.5
    assert torch.equal(first, (uniform - 0.5) * (2 * half_width))


def test_the_hash_of_a_built_in_model_covers_config_and_seed(monkeypatch):
    from dataclasses import replace

    from cvt_model.weights import hash_preset

    preset = PRESETS["cvt-tiny-random"]
    config = CvtConfig(**{**preset.config.model_dump(), "initializer_range": 0.5})
    hashes = {
        hash_preset(preset),
        hash_preset(replace(preset, seed=preset.seed + 1)),
        hash_preset(replace(preset, config=config)),
    }
    assert len(hashes) == 3
    assert resolve_checkpoint("cvt-tiny-random").weights_sha256 in hashes
