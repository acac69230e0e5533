"""The published architectures and the built-in models."""

import json

import pytest
import torch
import transformers

from cvt_model import CvtConfig, CvtForImageClassification
from cvt_model.hub import is_hub_id
from cvt_model.presets import ARCHITECTURES, HUB_IDS, PRESETS

# Counted in transformers' network of the same widths and depths; the paper says 20 M, 32 M, 277 M.
PARAMETERS = {"cvt-13": 19_997_480, "cvt-21": 31_622_696, "cvt-w24": 277_196_392}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_the_parameters_of_the_paper(name):
    with torch.device("meta"):
        model = CvtForImageClassification(ARCHITECTURES[name].config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS["-".join(name.split("-")[:2])]


@pytest.mark.parametrize("name", ["cvt-13", "cvt-21", "cvt-w24-384-22k"])
def test_an_architecture_has_the_layout_of_transformers(name):
    config = ARCHITECTURES[name].config
    with torch.device("meta"):
        ours = CvtForImageClassification(config).state_dict()
        theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**config.to_dict()))
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.items()} == expected


def test_cvt_13_is_what_transformers_builds_by_default():
    assert ARCHITECTURES["cvt-13"].config.with_num_labels(2) == CvtConfig()


def test_hub_ids_resolutions_and_heads_are_the_published_ones():
    assert set(HUB_IDS.values()) == {
        f"microsoft/cvt-{rest}"
        for rest in ("13", "13-384", "13-384-22k", "21", "21-384", "21-384-22k", "w24-384-22k")
    }
    for name, architecture in ARCHITECTURES.items():
        assert is_hub_id(HUB_IDS[name])
        assert HUB_IDS[name] == f"microsoft/{name}"
        assert architecture.image_size == (384 if "384" in name else 224)
        config = architecture.config
        assert config.num_labels == 1000
        assert config.embed_dim == tuple(64 * heads for heads in config.num_heads)


@pytest.mark.parametrize("config", [*PRESETS.values(), *ARCHITECTURES.values()])
def test_configs_survive_the_round_trip(config):
    assert CvtConfig.from_dict(json.loads(json.dumps(config.config.to_dict()))) == config.config


def test_no_built_in_model_hides_a_published_one():
    assert not PRESETS.keys() & ARCHITECTURES.keys()
