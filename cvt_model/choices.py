"""What users choose about inference, and what `auto` stands for. Imports no torch.

What enters: names. What leaves: names that are settled. It must not know networks.
"""

import importlib.util
from typing import Literal, get_args

Precision = Literal["float32", "bfloat16", "float16"]
BackendName = Literal["torch", "openvino"]
EmbeddingKind = Literal["pooled", "cls_token"]


def resolve_backend(backend: BackendName | Literal["auto"], *, on_gpu: bool) -> BackendName:
    """The back end to use; ValueError where the one that is named cannot work here."""
    if backend not in (*get_args(BackendName), "auto"):
        raise ValueError(f"backend: {backend!r} is none; choose torch, openvino or auto")
    installed = importlib.util.find_spec("openvino") is not None
    if backend == "auto":
        return "openvino" if installed and not on_gpu else "torch"
    if backend == "openvino" and not installed:
        raise ValueError(
            "backend: openvino is not installed; pip install 'cvt-pipeline[cpu]', or use torch"
        )
    if backend == "openvino" and on_gpu:
        raise ValueError("backend: openvino runs on CPUs here; use torch on a GPU")
    return backend


def resolve_precision(precision: Precision | Literal["auto"], *, on_gpu: bool) -> Precision:
    """`auto` is bfloat16 on a GPU, where it is several times faster, and float32 on a CPU."""
    if precision not in (*get_args(Precision), "auto"):
        raise ValueError(f"precision: {precision!r} is none; choose float32, bfloat16, float16 or auto")
    if precision == "auto":
        return "bfloat16" if on_gpu else "float32"
    return precision
