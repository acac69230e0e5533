"""The original authors' CvT written a second time, under their module names: an oracle for their files.

After `lib/models/cls_cvt.py` of github.com/microsoft/CvT, with a batch of one kept a batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from torch import Tensor, nn


def make_spec(**overrides: Any) -> dict[str, Any]:
    """A file's content for a tiny network; `depth=[1, 2]` sets MODEL.SPEC.DEPTH."""
    spec: dict[str, Any] = {
        "INIT": "trunc_norm",
        "NUM_STAGES": 3,
        "PATCH_SIZE": [7, 3, 3],
        "PATCH_STRIDE": [4, 2, 2],
        "PATCH_PADDING": [2, 1, 1],
        "DIM_EMBED": [8, 16, 24],
        "NUM_HEADS": [1, 2, 3],
        "DEPTH": [1, 1, 2],
        "MLP_RATIO": [4.0, 4.0, 4.0],
        "ATTN_DROP_RATE": [0.0, 0.0, 0.0],
        "DROP_RATE": [0.0, 0.0, 0.0],
        "DROP_PATH_RATE": [0.0, 0.0, 0.1],
        "QKV_BIAS": [True, True, True],
        "CLS_TOKEN": [False, False, True],
        "POS_EMBED": [False, False, False],
        "QKV_PROJ_METHOD": ["dw_bn", "dw_bn", "dw_bn"],
        "KERNEL_QKV": [3, 3, 3],
        "PADDING_KV": [1, 1, 1],
        "STRIDE_KV": [2, 2, 2],
        "PADDING_Q": [1, 1, 1],
        "STRIDE_Q": [1, 1, 1],
    }
    num_classes = overrides.pop("num_classes", 5)
    spec |= {key.upper(): value for key, value in overrides.items()}
    return {"MODEL": {"NAME": "cls_cvt", "NUM_CLASSES": num_classes, "SPEC": spec}}


class Attention(nn.Module):
    def __init__(self, spec: dict[str, Any], s: int) -> None:
        super().__init__()
        width, kernel = spec["DIM_EMBED"][s], spec["KERNEL_QKV"][s]
        self.method, self.heads, self.cls = (
            spec[key][s] for key in ("QKV_PROJ_METHOD", "NUM_HEADS", "CLS_TOKEN")
        )
        q = (spec["STRIDE_Q"][s], spec["PADDING_Q"][s])
        kv = (spec["STRIDE_KV"][s], spec["PADDING_KV"][s])
        self.pool = (kernel, *kv)
        for name, (stride, padding) in {"q": q, "k": kv, "v": kv}.items():
            setattr(self, f"proj_{name}", nn.Linear(width, width, bias=spec["QKV_BIAS"][s]))
            if self.method == "dw_bn":
                conv = nn.Conv2d(width, width, kernel, stride, padding, groups=width, bias=False)
                modules = nn.ModuleDict({"conv": conv, "bn": nn.BatchNorm2d(width)})
                setattr(self, f"conv_proj_{name}", modules)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        cls, tokens = x[:, : int(self.cls)], x[:, int(self.cls) :]
        image = tokens.transpose(1, 2).unflatten(2, (h, w))
        heads = []
        for name in "qkv":
            if self.method == "dw_bn":
                modules = getattr(self, f"conv_proj_{name}")
                projected = modules["bn"](modules["conv"](image))
            elif name == "q":
                projected = image
            else:
                projected = F.avg_pool2d(image, *self.pool, ceil_mode=True)
            projected = torch.cat((cls, projected.flatten(2).transpose(1, 2)), dim=1)
            projected = getattr(self, f"proj_{name}")(projected)
            heads.append(projected.unflatten(2, (self.heads, -1)).transpose(1, 2))
        q_, k_, v_ = heads
        weights = (q_ @ k_.transpose(2, 3) * x.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v_).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, spec: dict[str, Any], s: int) -> None:
        super().__init__()
        width = spec["DIM_EMBED"][s]
        hidden = int(width * spec["MLP_RATIO"][s])
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(spec, s), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = x + self.attn(self.norm1(x), h, w)
        hidden = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class Stage(nn.Module):
    def __init__(self, spec: dict[str, Any], s: int) -> None:
        super().__init__()
        width, channels = spec["DIM_EMBED"][s], spec["DIM_EMBED"][s - 1] if s else 3
        geometry = (spec[key][s] for key in ("PATCH_SIZE", "PATCH_STRIDE", "PATCH_PADDING"))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if spec["CLS_TOKEN"][s] else None
        proj = nn.Conv2d(channels, width, *geometry)
        self.patch_embed = nn.ModuleDict({"proj": proj, "norm": nn.LayerNorm(width)})
        self.blocks = nn.ModuleList(Block(spec, s) for _ in range(spec["DEPTH"][s]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.patch_embed["proj"](x)
        h, w = x.shape[2:]
        x = self.patch_embed["norm"](x.flatten(2).transpose(1, 2))
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x, h, w)
        cls = None if self.cls_token is None else x[:, :1]
        return x[:, x.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w)), cls


class OriginalCvt(nn.Module):
    """The original's classifier; every parameter and buffer random unless told otherwise."""

    def __init__(self, spec_file: dict[str, Any], randomise: bool = True) -> None:
        super().__init__()
        spec, classes = spec_file["MODEL"]["SPEC"], spec_file["MODEL"]["NUM_CLASSES"]
        self.num_stages = spec["NUM_STAGES"]
        for s in range(self.num_stages):
            setattr(self, f"stage{s}", Stage(spec, s))
        width = spec["DIM_EMBED"][-1]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()
        generator = torch.Generator().manual_seed(0)
        for name, tensor in self.state_dict().items():
            if randomise and tensor.is_floating_point():
                low, high = (0.5, 2.0) if name.endswith("running_var") else (-0.3, 0.3)
                tensor.uniform_(low, high, generator=generator)
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        cls = None
        for s in range(self.num_stages):
            x, cls = getattr(self, f"stage{s}")(x)
        return self.norm(x.flatten(2).transpose(1, 2) if cls is None else cls).mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def write_pth(
    folder: Path,
    spec_file: dict[str, Any],
    state: Any = None,
    name: str = "tiny",
    spec_suffix: str = ".json",
) -> Path:
    """The weights of a random network (or `state`), and its spec beside them unless the suffix is empty."""
    weights = folder / f"{name}.pth"
    torch.save(OriginalCvt(spec_file).state_dict() if state is None else state, weights)
    if spec_suffix:
        text = json.dumps(spec_file) if spec_suffix == ".json" else yaml.safe_dump(spec_file)
        weights.with_suffix(spec_suffix).write_text(text)
    return weights
