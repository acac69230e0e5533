"""How much memory a form takes: measured in a process of its own.

Enters: what the form is made from. Leaves: bytes. On a CPU the growth of the resident memory at its
highest, from the moment when libraries and images are loaded, over making the form and running it: weights,
graphs, and what making them took. On a GPU what torch allocated there at most.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from pipeline.bench.inputs import Inputs, Setting, Unavailable
from pipeline.bench.rivals import Form, failures_told

NUM_RUNS = 2
TRANSFORMERS = "transformers.models.cvt.modeling_cvt"
MODULES = {
    "ours": ("openvino.opset14",),
    "transformers_eager": (TRANSFORMERS,),
    "transformers_compiled": (TRANSFORMERS, "torch._inductor.compile_fx"),
    "transformers_openvino": (TRANSFORMERS, "openvino.frontend.pytorch.ts_decoder"),
    "transformers_onnxruntime": (TRANSFORMERS, "onnxruntime", "onnxscript"),
}


def measure_memory(setting: Setting, form: Form, batch_size: int) -> int | None:
    """Bytes that the form takes at most; None where this system does not tell, or they do not suffice."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            return pool.submit(peak_growth, setting, form, batch_size).result()
        except (BrokenProcessPool, Unavailable):
            return None


def peak_growth(setting: Setting, form: Form, batch_size: int) -> int | None:
    for module in MODULES.get(form.name, ()):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    inputs = Inputs(setting)
    before = resident_bytes("VmRSS")
    with contextlib.suppress(OSError):  # what importing took at its highest is not the form's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    with failures_told(form):
        run = form.make(inputs, batch_size)
        for _ in range(NUM_RUNS):
            run()
    if inputs.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    highest = resident_bytes("VmHWM")
    return None if before is None or highest is None else highest - before


def resident_bytes(field: str) -> int | None:
    """A line of this process's memory, as Linux tells it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None
