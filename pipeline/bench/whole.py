"""The benchmark of the whole: what each stage could do here alone, what a real run reaches, and a rival.

Enters: `WholeBench`. Leaves: figures by name, of JSON's types. Nothing is judged here. The names:

read_images_per_s, read_bytes_per_s   tars to encoded images, one process
decode_images_per_s_core              encoded images to exact pixels, one process on one core
decode_fast_images_per_s_core         to fast ones
decode_images_per_s                   on all cores at once, in the run's mode
decode_ratio_fast                     fast's speed to exact's on these images, the same core in turn
decode_ratio_fast_12mp                on copies of a few as JPEGs of 4000 x 3000
cosine_fast_mean, cosine_fast_min     of an image's embedding decoded fast with that decoded exactly
pixel_difference_fast                 mean absolute difference of their pixels, of 255
model_images_per_s                    pixels to features on all threads (all GPUs), chunk_images at once
write_images_per_s                    rows to a shard's file on the output's disk, one process
ceiling_images_per_s                  on a CPU, whose cores decoding and model share,
                                      1 / (1 / decode_images_per_s + 1 / model_images_per_s);
                                      on GPUs, where they overlap, the lower of the two
run_images_per_s                      of a run in a process of its own: images after the first receipt,
                                      over the seconds from there to the last
fraction_of_ceiling                   run_images_per_s / ceiling_images_per_s
startup_s, limiting_stage, stage_s, stage_slots    as that run's report has them
pipeline_images_per_s                 transformers' pipeline in float32, batches of 16, after the first
ratio_pipeline                        run_images_per_s / pipeline_images_per_s: both starts apart

Speeds are medians; `<name>_min` and `<name>_max` are the least and the most that was seen. What was not
measured is null, with its reason in `unavailable`. Beside them: `checkpoint`, `weights`, `images`,
`num_photographs`, `num_images`, `rounds`, `precision`, `decode`, `backend`, `hardware`, `versions`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cvt_model.inference import DTYPES
from pipeline.bench.corpus import load_photographs
from pipeline.bench.ground import MODES, Ground, Say, WholeBench
from pipeline.bench.model import check_choices
from pipeline.bench.processes import on_cores, usable_cores
from pipeline.bench.whole_figures import figures
from pipeline.errors import ConfigError


def bench_whole(bench: WholeBench, say: Say = lambda text: None) -> dict[str, Any]:
    """Measure everything; `say` is told what is being done.

    Raises ConfigError for arguments that name nothing of use, PipelineError where the run fails.
    """
    check_choices("--precision", [bench.precision], ("auto", *DTYPES))
    check_choices("--decode", [bench.decode], MODES)
    cores = usable_cores()
    if bench.num_threads is not None and bench.num_threads > len(cores):
        raise ConfigError(f"--threads: {bench.num_threads}, but this process may use {len(cores)} cores")
    photographs = load_photographs(bench.images)
    with temporary_folder(bench) as folder, on_cores(cores[: bench.num_threads]):
        ground = Ground(bench, folder, photographs, cores[: bench.num_threads])
        described = ground.describe()
        rounds = [ground.measure(number, say) for number in range(bench.rounds)]
        return {**described, **figures(rounds)}


@contextmanager
def temporary_folder(bench: WholeBench) -> Iterator[Path]:
    if bench.folder is not None and not bench.folder.is_dir():
        raise ConfigError(f"--folder: {bench.folder} is no folder")
    with tempfile.TemporaryDirectory(prefix="cvt-bench-", dir=bench.folder) as folder:
        yield Path(folder).resolve()
