"""Hub ids and short names: what the cache holds, what is downloaded, what is said when neither can be."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from cvt_model import CheckpointError, resolve_checkpoint
from cvt_model.hub import fetch
from cvt_model.weights import WEIGHT_FILES
from tests.saved_cvt import assert_loads_as, reference, saved
from tests.tensorflow_file import save_tensorflow

__all__ = ["reference", "saved"]  # fixtures

REPO = Path(__file__).parents[1]


@pytest.fixture
def hub_cache(saved, tmp_path, monkeypatch):
    """A Hub cache that holds org/tiny, main and the branch v2, and no network."""
    repo = tmp_path / "hub" / "models--org--tiny"
    for commit, branch in (("a" * 40, "main"), ("b" * 40, "v2")):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for file in saved.iterdir():
            blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
        state = load_file(saved / "model.safetensors")
        state["layernorm.bias"].add_(1)
        save_file(state, saved / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache_without_network(hub_cache, reference):
    checkpoint = resolve_checkpoint("org/tiny")
    assert checkpoint.source == "org/tiny"
    assert checkpoint.path.is_relative_to(hub_cache)
    assert_loads_as(reference, "org/tiny")


def test_a_revision_picks_its_snapshot(hub_cache):
    main, branch = resolve_checkpoint("org/tiny"), resolve_checkpoint("org/tiny@v2")
    assert branch.path.name == "b" * 40
    assert main.weights_sha256 != branch.weights_sha256
    assert resolve_checkpoint("org/tiny@" + "a" * 40).weights_sha256 == main.weights_sha256


def test_a_short_name_means_the_published_model(hub_cache, reference):
    (hub_cache / "models--org--tiny").rename(hub_cache / "models--microsoft--cvt-13")
    checkpoint = resolve_checkpoint("cvt-13")
    assert checkpoint.source == "microsoft/cvt-13"
    assert_loads_as(reference, "cvt-13")
    assert resolve_checkpoint("cvt-13@v2").source == "microsoft/cvt-13@v2"


@pytest.mark.parametrize("name", ["cvt-21", "cvt-w24-384-22k"])
def test_a_short_name_that_is_not_cached_is_named_in_full(hub_cache, name):
    with pytest.raises(CheckpointError, match=f"^microsoft/{name}: .*unset HF_HUB_OFFLINE"):
        resolve_checkpoint(name)


def test_a_hub_repository_with_weights_of_tensorflow_alone_is_read(hub_cache, reference, tmp_path):
    save_tensorflow(tmp_path / "tf", reference)
    snapshot = hub_cache / "models--org--tiny" / "snapshots" / ("a" * 40)
    (snapshot / "model.safetensors").unlink()
    shutil.copy(tmp_path / "tf" / "tf_model.h5", snapshot)
    assert resolve_checkpoint("org/tiny").weight_files[0].name == "tf_model.h5"
    assert_loads_as(reference, "org/tiny")


@pytest.mark.parametrize(
    ("holds", "asked"),
    [
        ("model.safetensors", ["model.safetensors"]),
        ("pytorch_model.bin", ["model.safetensors", "pytorch_model.bin"]),
        ("tf_model.h5", ["model.safetensors", "pytorch_model.bin", "tf_model.h5"]),
    ],
)
def test_weights_of_one_kind_are_downloaded(tmp_path, monkeypatch, holds, asked):
    seen = []

    def download(repo_id, revision, allow_patterns):
        weights = [name for name in WEIGHT_FILES if name in allow_patterns and "index" not in name]
        seen.extend(weights)
        if holds in weights:
            (tmp_path / holds).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch("org/tiny") == tmp_path
    assert seen == asked


@pytest.mark.parametrize("source", ["org/absent", "org/tiny@v3", "absent"])
def test_an_id_that_is_not_cached_is_named_with_the_remedies(hub_cache, source):
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(source)
    message = str(caught.value)
    assert message.startswith(source)
    for remedy in ("check the spelling", "unset HF_HUB_OFFLINE", "give a local directory"):
        assert remedy in message


def test_hf_home_and_offline_are_honoured_in_the_environment(hub_cache):
    environment = {
        **os.environ, "PYTHONPATH": str(REPO), "HF_HOME": str(hub_cache.parent),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_CACHE", None)
    code = "import cvt_model; print(cvt_model.resolve_checkpoint('org/tiny').path)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith(str(hub_cache))


def test_an_existing_directory_wins_over_a_hub_id_and_a_built_in_name(hub_cache, saved):
    for name in ("org/tiny", "cvt-tiny-random"):
        shutil.copytree(saved, hub_cache.parent / name)
        assert resolve_checkpoint(name).path == Path(name)
