"""The batch size that is fastest on this machine: measured once, remembered in the cache folder.

What enters: a way to make a back end at a batch size. What leaves: a batch size. It must not know
networks or devices.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cvt_model.cache import cache_folder

logger = logging.getLogger(__name__)

BUDGET_S = 20.0  # after so long no further size is tried
REPEATS = 2
WORTHWHILE = 1.03  # a larger batch must be so much faster: it costs memory and padding


def choose_batch_size(
    sizes: Sequence[int],
    default: int,
    measure: Callable[[int], float],
    circumstances: dict[str, object],
) -> int:
    """The smallest of `sizes` (ascending) that is about as fast as any; remembered for these circumstances.

    `measure` tells images/s of one size; MemoryError from it ends the trial, as larger ones would not fit.
    Where the trial takes too long (a huge network, a busy machine) it is `default`, and nothing is
    remembered.
    """
    file = cache_folder() / "batch_sizes" / f"{digest(circumstances)}.json"
    try:
        return int(json.loads(file.read_bytes())["batch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or damaged: measured now
    speeds: dict[int, float] = {}
    began = time.monotonic()
    for size in sizes:
        if speeds and time.monotonic() - began > BUDGET_S:
            logger.debug("measuring batch sizes takes too long; taking %d", default)
            return default
        try:
            speeds[size] = measure(size)
        except MemoryError:
            break
    logger.debug("images/s by batch size: %s", speeds)
    best = max(speeds.values(), default=0.0)
    chosen = next((size for size, speed in speeds.items() if speed * WORTHWHILE >= best), sizes[0])
    remember(file, {"batch_size": chosen, "images_per_s": speeds, **circumstances})
    return chosen


def images_per_s(run: Callable[[np.ndarray], object], pixels_BHWC: np.ndarray) -> float:
    """The best of a few runs over these images, after one to warm up."""
    run(pixels_BHWC)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run(pixels_BHWC)
        seconds.append(time.perf_counter() - began)
    return len(pixels_BHWC) / min(seconds)


def remember(file: Path, values: dict[str, object]) -> None:
    """Write the file whole or not at all; a cache that cannot be written is done without."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        logger.info("the measured batch size cannot be remembered: %s", error)


def digest(circumstances: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:16]


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
