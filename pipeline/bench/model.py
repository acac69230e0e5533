"""The benchmark of the model: our forms against every other way to run the same CvT, in one run.

Enters: `ModelBench`. Leaves: figures by name, of JSON's types: ratios of speed, images a second of each
form with their spread, agreement with transformers' float32, memory, and the share of what the machine can
compute. Nothing is judged here.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvt_model.backends import FeatureArrays
from cvt_model.choices import Precision, resolve_backend
from cvt_model.errors import CheckpointError
from cvt_model.inference import DTYPES, available_cores
from pipeline.bench.figures import agreement, all_ratios, ratio_of, speed_figures
from pipeline.bench.flops import count_flops
from pipeline.bench.inputs import Inputs, Setting, Unavailable, save_random
from pipeline.bench.machine import hardware, versions
from pipeline.bench.memory import measure_memory
from pipeline.bench.peak import matmul_peak
from pipeline.bench.rivals import RIVALS, Form, Run, failures_told, is_emulated, plain_features
from pipeline.bench.rounds import interleave
from pipeline.errors import ConfigError

RUN_BUDGET_S = 10.0  # for one call in a precision that is emulated: beyond it the batch is made smaller
FORM_BUDGET_S = 25.0  # for all rounds of one form: beyond it there are fewer
SHORT_S = 3.0  # calls as short as this are warmed up twice
IMAGES_COMPARED = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelBench:
    """What is to be measured."""

    checkpoint: str
    batch_size: int
    precisions: Sequence[str] = ("float32", "bfloat16")
    rivals: Sequence[str] = RIVALS
    rounds: int = 5
    num_threads: int | None = None  # unless given all that this process may use
    images: Path | None = None  # a folder of photographs; None: random pixels
    random_weights: bool = False
    with_memory: bool = False


@dataclass(frozen=True)
class Contender:
    """A form that runs here: what it answers, how much it is handed and how often."""

    form: Form
    run: Run
    features: FeatureArrays
    batch_size: int
    num_rounds: int


def bench_model(bench: ModelBench, say: Say = lambda text: None) -> dict[str, Any]:
    """Measure everything; `say` is told what is being done.

    Raises ConfigError for arguments that name nothing of use.
    """
    check_choices("--precision", bench.precisions, tuple(DTYPES))
    check_choices("--rival", bench.rivals, RIVALS)
    with checkpoint_source(bench) as source:
        threads = bench.num_threads or available_cores()
        inputs = Inputs(Setting(source, bench.batch_size, threads, bench.images))
        try:
            return {**describe(bench, inputs), **measure(bench, inputs, say)}
        except CheckpointError as error:
            raise ConfigError(f"--checkpoint: {error}") from error


def check_choices(option: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ConfigError(f"{option}: found {unknown[0]!r}, expected one of {', '.join(known)}")


@contextlib.contextmanager
def checkpoint_source(bench: ModelBench) -> Iterator[str]:
    """What names the checkpoint: a temporary directory where its weights are drawn."""
    if not bench.random_weights:
        yield bench.checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        save_random(bench.checkpoint, Path(folder))
        yield folder


def describe(bench: ModelBench, inputs: Inputs) -> dict[str, Any]:
    """What was measured where."""
    on_gpu = inputs.device.type == "cuda"
    return {
        "checkpoint": bench.checkpoint,
        "weights": "random" if bench.random_weights else "of the checkpoint",
        "images": str(bench.images) if bench.images else "random pixels",
        "image_size": list(inputs.size),
        "batch_size": bench.batch_size,
        "backend": resolve_backend("auto", on_gpu=on_gpu),
        "hardware": hardware(inputs.device, inputs.setting.num_threads),
        "versions": versions(),
    }


def measure(bench: ModelBench, inputs: Inputs, say: Say) -> dict[str, Any]:
    """Every figure of one run."""
    truth, agreement_with = find_truth(inputs)
    contenders, unavailable = make_contenders(bench, inputs, say)
    say(f"measuring {len(contenders)} forms in turn, up to {bench.rounds} rounds")
    image_s = seconds_per_image(contenders, inputs.num_batches)
    flops = count_flops(inputs.checkpoint.config, *inputs.size)
    peaks = measure_peaks(contenders, inputs, say)
    forms: dict[str, dict[str, Any] | None] = dict.fromkeys(unavailable)
    for key, contender in contenders.items():
        precision = contender.form.precision
        forms[key] = {
            "batch_size": contender.batch_size,
            "rounds": contender.num_rounds,
            **speed_figures(image_s[key], flops, peaks[precision]),
            "ratio_to_eager": ratio_of(image_s, key, f"transformers_eager_{precision}"),
            **agreement(contender.features, truth),
            "peak_memory_bytes": memory_of(contender, inputs, say) if bench.with_memory else None,
        }
    return {
        **all_ratios(image_s, bench.precisions),
        "gflop_per_image": flops / 1e9,
        **{f"peak_gflops_{precision}": peak / 1e9 for precision, peak in peaks.items()},
        "agreement_with": agreement_with,
        "forms": {form.key: forms[form.key] for form in chosen_forms(bench, inputs)},
        "unavailable": unavailable,
    }


def find_truth(inputs: Inputs) -> tuple[FeatureArrays, str]:
    """Features of the first images by transformers in float32, else by our own plain network."""
    count = min(IMAGES_COMPARED, inputs.setting.batch_size)
    form = Form("transformers_eager", "float32")
    try:
        with failures_told(form):
            return form.make(inputs, count)(), "transformers eager float32"
    except Unavailable:
        return plain_features(inputs, count), "cvt_model.model float32"


def chosen_forms(bench: ModelBench, inputs: Inputs) -> list[Form]:
    """Every form of this run; our torch form only where it is not what `auto` means."""
    auto = resolve_backend("auto", on_gpu=inputs.device.type == "cuda")
    names = ["ours", *(["ours_torch"] if auto != "torch" else [])]
    names += [f"transformers_{name}" for name in RIVALS if name in bench.rivals]
    return [Form(name, precision) for precision in precisions(bench) for name in names]


def precisions(bench: ModelBench) -> list[Precision]:
    return [name for name in DTYPES if name in bench.precisions]  # type: ignore[misc]


def make_contenders(
    bench: ModelBench, inputs: Inputs, say: Say
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The forms that run here, warmed up, and why the others do not."""
    contenders: dict[str, Contender] = {}
    unavailable: dict[str, str] = {}
    batch_sizes: dict[str, int] = {}
    for form in chosen_forms(bench, inputs):
        say(f"preparing {form.key}")
        batch_size = bench.batch_size
        try:
            with failures_told(form):
                if form.runs_in_torch and is_emulated(form.precision, inputs.device):
                    if form.precision not in batch_sizes:
                        batch_sizes[form.precision] = affordable_batch(inputs, form.precision)
                    batch_size = batch_sizes[form.precision]
                contenders[form.key] = prepare(form, inputs, batch_size, bench.rounds)
        except Unavailable as reason:
            unavailable[form.key] = str(reason)
    return contenders, unavailable


def affordable_batch(inputs: Inputs, precision: Precision) -> int:
    """The batch, or as much of it as transformers runs within the budget, judged by one image."""
    batch_size = inputs.setting.batch_size
    one_image = Form("transformers_eager", precision).make(inputs, 1)
    _, seconds = timed(one_image)
    if seconds * batch_size > RUN_BUDGET_S and seconds < SHORT_S:
        _, seconds = timed(one_image)
    return max(1, min(batch_size, int(RUN_BUDGET_S / seconds)))


def prepare(form: Form, inputs: Inputs, batch_size: int, rounds: int) -> Contender:
    run = form.make(inputs, batch_size)
    features, seconds = timed(run)
    if seconds < SHORT_S:
        features, seconds = timed(run)
    num_rounds = max(1, min(rounds, int(FORM_BUDGET_S / seconds)))
    copied = FeatureArrays(*(array[:IMAGES_COMPARED].copy() for array in features))
    return Contender(form, run, copied, batch_size, num_rounds)


def timed(run: Run) -> tuple[FeatureArrays, float]:
    began = time.perf_counter()
    features = run()
    return features, time.perf_counter() - began


def seconds_per_image(contenders: Mapping[str, Contender], num_batches: int) -> dict[str, list[float]]:
    seconds = interleave(
        {key: it.run for key, it in contenders.items()},
        {key: it.num_rounds for key, it in contenders.items()},
    )
    return {
        key: [value / (contenders[key].batch_size * num_batches) for value in values]
        for key, values in seconds.items()
    }


def measure_peaks(contenders: Mapping[str, Contender], inputs: Inputs, say: Say) -> dict[Precision, float]:
    """What the machine can compute in each precision, operations a second."""
    peaks: dict[Precision, float] = {}
    for contender in contenders.values():
        precision = contender.form.precision
        if precision not in peaks:
            say(f"measuring what this machine can compute in {precision}")
            peaks[precision] = matmul_peak(precision, inputs.device, inputs.setting.num_threads)
    return peaks


def memory_of(contender: Contender, inputs: Inputs, say: Say) -> int | None:
    say(f"memory of {contender.form.key}, in a process of its own")
    return measure_memory(inputs.setting, contender.form, contender.batch_size)
