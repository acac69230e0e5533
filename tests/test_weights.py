"""Reading weights takes the memory of the network that they become, whatever the file's size."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from cvt_model import CvtConfig, CvtForImageClassification
from cvt_model.save import save_checkpoint
from cvt_model.weights import read_tensors

# CvT-W24's widths with fewer layers: 57 million parameters, the largest tensor 17 MB.
WIDE = {"embed_dim": (192, 768, 1024), "num_heads": (3, 12, 16), "depth": (1, 1, 4), "num_labels": 10}
LOAD = """
import resource, sys, torch
from cvt_model import resolve_checkpoint
import cvt_model.model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoint = resolve_checkpoint(sys.argv[1])
torch.zeros(2**20).to(torch.bfloat16)
before = peak()
model = checkpoint.load(getattr(torch, sys.argv[2]))
grown = peak() - before
print(grown / sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A large model whole and in shards."""
    folder = tmp_path_factory.mktemp("wide")
    model = CvtForImageClassification(CvtConfig(**WIDE))
    save_checkpoint(folder / "whole", model)
    split(folder / "whole", folder / "shards", 3)
    return folder


def split(source, target, count):
    """The same checkpoint as `count` shards and their index."""
    target.mkdir()
    state = load_file(source / "model.safetensors")
    weight_map = {
        key: f"model-{n % count + 1:05d}-of-{count:05d}.safetensors" for n, key in enumerate(state)
    }
    for name in set(weight_map.values()):
        save_file({key: value for key, value in state.items() if weight_map[key] == name}, target / name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(source / "config.json", target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["whole", "shards"])
def test_loading_holds_no_second_copy(wide, form, dtype):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(wide / form), dtype], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.3


def test_every_tensor_is_read_once_across_maps(tmp_path, monkeypatch):
    """However often the file is mapped anew."""
    model = CvtForImageClassification(CvtConfig(depth=(1, 1, 1), num_labels=3))
    save_checkpoint(tmp_path, model)
    file = tmp_path / "model.safetensors"
    for numbers in (1, 1000, 2**40):
        monkeypatch.setattr("cvt_model.weights.MAPPED_NUMBERS", numbers)
        found = [(key, tensor.clone()) for key, tensor in read_tensors((file,))]
        assert len(found) == len(dict(found))
        expected = load_file(file)
        assert dict(found).keys() == expected.keys()
        assert all(tensor.equal(expected[key]) for key, tensor in found)
