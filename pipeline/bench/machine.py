"""The machine and the packages that figures were measured with.

Enters: a device. Leaves: facts of JSON's types. Measures nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from cvt_model.calibration import cpu_name
from cvt_model.inference import cpu_computes_in

PACKAGES = ("cvt-pipeline", "torch", "transformers", "openvino", "onnxruntime")


def hardware(device: torch.device, num_threads: int) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": num_threads,
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "bfloat16_on_cpu": cpu_computes_in("bfloat16"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def versions() -> dict[str, str | None]:
    """By distribution; None where it is not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
