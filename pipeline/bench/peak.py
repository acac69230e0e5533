"""What this machine can compute: the fastest matrix product that its libraries reach, measured.

Enters: a precision. Leaves: operations a second. Knows no network.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np
import torch

from cvt_model.choices import Precision
from cvt_model.inference import DTYPES

SIDES = {"cpu": 2048, "cuda": 8192}
TRIAL_SIDE = 256
BUDGET_S = 4.0  # for one product; where torch lacks kernels a smaller one must do
REPEATS = 3
OPENVINO_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def matmul_peak(precision: Precision, device: torch.device, num_threads: int) -> float:
    """Operations a second of the better of torch and OpenVINO, whichever is installed."""
    speeds = [torch_peak(precision, device, num_threads)]
    if device.type == "cpu":
        with contextlib.suppress(ImportError):
            speeds.append(openvino_peak(precision, num_threads))
    return max(speeds)


def torch_peak(precision: Precision, device: torch.device, num_threads: int) -> float:
    torch.set_num_threads(num_threads)

    def speed(side: int) -> float:
        left, right = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))

        def multiply() -> None:
            torch.mm(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return best_speed(multiply, side)

    side = SIDES[device.type]
    trial = speed(TRIAL_SIDE)
    return speed(side) if 2 * side**3 / trial < BUDGET_S else trial


def openvino_peak(precision: Precision, num_threads: int) -> float:
    import openvino as ov
    from openvino import opset13 as ops

    side = SIDES["cpu"]
    left, right = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
    parameter = ops.parameter([side, side], np.float32)
    model = ov.Model([ops.matmul(parameter, ops.constant(right), False, True)], [parameter], "matmul")
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": num_threads,
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
    }
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    return best_speed(lambda: request.infer([left], share_inputs=True, share_outputs=True), side)


def best_speed(multiply: Callable[[], object], side: int) -> float:
    """Operations a second of the best of a few products, after one to warm up."""
    multiply()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)
