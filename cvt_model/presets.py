"""Models by name: the published architectures, and the built-in models that need no download.

What enters: nothing. What leaves: two tables. It must not know tensors, files or the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cvt_model.config import CvtConfig


@dataclass(frozen=True)
class Architecture:
    """A network of the paper (table 2) for ImageNet's 1,000 classes, and where its weights are."""

    config: CvtConfig
    image_size: int  # pixels a side, of training and of evaluation
    hub_id: str


CVT_13 = CvtConfig(num_labels=1000)
CVT_21 = CvtConfig(depth=(1, 4, 16), num_labels=1000)
CVT_W24 = CvtConfig(embed_dim=(192, 768, 1024), num_heads=(3, 12, 16), depth=(2, 2, 20), num_labels=1000)

# A name ends in the resolution where it is not 224, and in -22k where ImageNet-22k came first.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        name: Architecture(config, image_size, f"microsoft/{name}")
        for name, config, image_size in (
            ("cvt-13", CVT_13, 224),
            ("cvt-13-384", CVT_13, 384),
            ("cvt-13-384-22k", CVT_13, 384),
            ("cvt-21", CVT_21, 224),
            ("cvt-21-384", CVT_21, 384),
            ("cvt-21-384-22k", CVT_21, 384),
            ("cvt-w24-384-22k", CVT_W24, 384),
        )
    }
)
HUB_IDS: Mapping[str, str] = MappingProxyType({name: it.hub_id for name, it in ARCHITECTURES.items()})


DEFAULT_MODEL = "cvt-tiny-cifar10"  # of what is to mean something without a download

# Built-in models that were trained: directories of the Hub's layout in trained/, with their cards.
TRAINED_FOLDER = Path(__file__).parent / "trained"
TRAINED = tuple(sorted(path.parent.name for path in TRAINED_FOLDER.glob("*/config.json")))


@dataclass(frozen=True)
class Preset:
    """A built-in model of random weights: its network, their seed, its preprocessing."""

    config: CvtConfig
    seed: int
    processor: Mapping[str, Any]  # in the layout of preprocessor_config.json


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "cvt-tiny-random": Preset(
            config=CvtConfig(
                patch_stride=(4, 2, 1),
                embed_dim=(32, 64, 192),
                num_heads=(4, 4, 4),
                depth=(1, 2, 3),
                drop_path_rate=(0.0, 0.0, 0.0),
                cls_token=(False, False, False),
                initializer_range=0.07,
                num_labels=10,
            ),
            seed=20240229,
            processor={
                "size": {"shortest_edge": 64},
                "crop_pct": 0.875,
                "resample": 3,
                "image_mean": (0.485, 0.456, 0.406),
                "image_std": (0.229, 0.224, 0.225),
            },
        )
    }
)
