"""The count of operations, against torch's counter and the paper."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cvt_model.config import CvtConfig
from cvt_model.model import CvtForImageClassification
from cvt_model.presets import ARCHITECTURES
from pipeline.bench.flops import count_flops

TINY = {"embed_dim": (16, 32, 48), "num_heads": (1, 2, 3), "depth": (1, 2, 3), "num_labels": 5}


def counted_by_torch(config, height, width):
    with torch.device("meta"):
        model = CvtForImageClassification(config).eval()
        pixels = torch.empty(1, config.num_channels, height, width)
    # The kernels of attention on CPUs are not in torch's table; the plain products are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(pixels)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"cls_token": (True, False, True), "mlp_ratio": (2.0, 3.5, 4.0), "qkv_bias": (False,) * 3},
        {"cls_token": (False,) * 3, "num_labels": 0, "num_channels": 1},
        {"qkv_projection_method": ("avg", "linear", "dw_bn"), "stride_kv": (3, 2, 1)},
        {"qkv_projection_method": ("avg",) * 3, "kernel_qkv": (2, 3, 4), "padding_kv": (0, 1, 2)},
        {"kernel_qkv": (5, 1, 3), "padding_q": (2, 0, 1), "padding_kv": (0, 0, 1)},
        {"patch_sizes": (4, 2, 3), "patch_padding": (0, 1, 2), "patch_stride": (3, 1, 2)},
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_the_count_is_torchs(overrides, size):
    config = CvtConfig(**{**TINY, **overrides})
    assert count_flops(config, *size) == counted_by_torch(config, *size)


# In GMAC, as the paper's table 2 has them under FLOPs.
@pytest.mark.parametrize(
    ("name", "published"),
    [("cvt-13", 4.5), ("cvt-21", 7.1), ("cvt-13-384", 16.3), ("cvt-w24-384-22k", 193.2)],
)
def test_published_networks_need_what_the_paper_says(name, published):
    architecture = ARCHITECTURES[name]
    flops = count_flops(architecture.config, architecture.image_size, architecture.image_size)
    assert flops / 2e9 == pytest.approx(published, rel=0.03)
