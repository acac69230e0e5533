"""The benchmark of the model: our forms against every other way to run the same CvT, in one run.

Enters: `ModelBench`. Leaves: figures by name, of JSON's types: ratios of speed, images a second of each
form with their spread, agreement with transformers' float32, memory, and the share of what the machine can
compute. Nothing is judged here.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvt_model.backends import FeatureArrays
from cvt_model.errors import CheckpointError
from cvt_model.inference import DTYPES, Precision, available_cores, resolve_backend
from pipeline.bench_inputs import Inputs, Setting, Unavailable, save_random
from pipeline.bench_machine import hardware, has_arithmetic, versions
from pipeline.bench_memory import measure_memory
from pipeline.errors import ConfigError
from pipeline.flops import count_flops
from pipeline.peak import matmul_peak
from pipeline.rivals import MAKERS, Form, Run
from pipeline.rounds import Spread, interleave, ratio

RUN_BUDGET_S = 30.0  # for one call of transformers in torch: beyond it the batch is made smaller
FORM_BUDGET_S = 60.0  # for all rounds of one form: beyond it there are fewer
SHORT_S = 5.0  # calls as short as this are warmed up twice
RIVALS = tuple(name.removeprefix("transformers_") for name in MAKERS if not name.startswith("ours"))
# The figures that compare two forms, ours first.
RATIOS = {
    "ratio": ("ours", "transformers_eager"),
    "ratio_torch": ("ours_torch", "transformers_eager"),
    "ratio_compiled": ("ours", "transformers_compiled"),
    "ratio_openvino": ("ours", "transformers_openvino"),
    "ratio_onnxruntime": ("ours", "transformers_onnxruntime"),
}


@dataclass(frozen=True)
class ModelBench:
    """What is to be measured."""

    checkpoint: str
    batch_size: int
    precisions: Sequence[str] = ("float32", "bfloat16")
    rivals: Sequence[str] = RIVALS
    rounds: int = 7
    num_threads: int | None = None  # unless given all that this process may use
    images: Path | None = None
    random_weights: bool = False
    with_memory: bool = False


@dataclass(frozen=True)
class Contender:
    """A form that runs here, what a call of it takes, and what it answers."""

    form: Form
    run: Run
    batch_size: int
    num_rounds: int
    features: FeatureArrays


def bench_model(bench: ModelBench, on_step: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure everything; `on_step` is told what is being done.

    Raises ConfigError for arguments that name nothing.
    """
    check_choices("--precision", bench.precisions, tuple(DTYPES))
    check_choices("--rival", bench.rivals, RIVALS)
    with checkpoint_source(bench) as source:
        threads = bench.num_threads or available_cores()
        inputs = Inputs(Setting(source, bench.batch_size, threads, bench.images))
        try:
            return measure(bench, inputs, on_step)
        except CheckpointError as error:
            raise ConfigError(f"--checkpoint: {error}") from error


def check_choices(option: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ConfigError(f"{option}: found {unknown[0]!r}, expected one of {', '.join(known)}")


@contextlib.contextmanager
def checkpoint_source(bench: ModelBench) -> Iterator[str]:
    if not bench.random_weights:
        yield bench.checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        save_random(bench.checkpoint, Path(folder))
        yield folder


def measure(bench: ModelBench, inputs: Inputs, on_step: Callable[[str], None]) -> dict[str, Any]:
    contenders, unavailable = make_contenders(bench, inputs, on_step)
    on_step(f"measuring {len(contenders)} forms in turn")
    seconds = interleave(
        {key: it.run for key, it in contenders.items()},
        {key: it.num_rounds for key, it in contenders.items()},
    )
    per_image_s = {
        key: [s / (contenders[key].batch_size * inputs.num_batches) for s in values]
        for key, values in seconds.items()
    }
    truth, agreement_with = find_truth(contenders, inputs)
    flops = count_flops(inputs.checkpoint.config, *inputs.size)
    peaks: dict[str, float] = {}
    for precision in dict.fromkeys(it.form.precision for it in contenders.values()):
        on_step(f"measuring what this machine can compute in {precision}")
        peaks[precision] = matmul_peak(precision, inputs.device, inputs.setting.num_threads)
    forms: dict[str, dict[str, Any] | None] = dict.fromkeys(unavailable)
    for key, contender in contenders.items():
        precision = contender.form.precision
        forms[key] = {
            **speed_figures(per_image_s[key], flops, peaks[precision]),
            "ratio_to_eager": ratio_between(per_image_s, key, f"transformers_eager_{precision}"),
            "batch_size": contender.batch_size,
            "rounds": contender.num_rounds,
            **agreement(contender.features, truth),
            "peak_memory_bytes": None,
        }
        if bench.with_memory:
            on_step(f"memory of {key}, in a process of its own")
            memory = measure_memory(inputs.setting, contender.form, contender.batch_size)
            forms[key] = {**forms[key], "peak_memory_bytes": memory}  # type: ignore[dict-item]
    return {
        **describe(bench, inputs),
        **ratios(per_image_s, bench.precisions),
        **{f"peak_gflops_{precision}": peak / 1e9 for precision, peak in peaks.items()},
        "gflop_per_image": flops / 1e9,
        "agreement_with": agreement_with,
        "forms": {key: forms[key] for key in form_keys(bench)},
        "unavailable": unavailable,
    }


def form_keys(bench: ModelBench) -> list[str]:
    return [form.key for form in chosen_forms(bench)]


def chosen_forms(bench: ModelBench) -> list[Form]:
    """Every form of this run, one precision after the other."""
    names = ["ours", "ours_torch", *(f"transformers_{name}" for name in RIVALS if name in bench.rivals)]
    return [Form(name, precision) for precision in bench.precisions for name in names]  # type: ignore[arg-type]
