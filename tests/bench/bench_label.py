"""How the memory of `label` grows with the rows: outputs of different sizes, each labelled by a process.

    python tests/bench/bench_label.py [--rows 1000000,10000000] [--methods head,probe]

Makes outputs of vectors around ten centres, with logits, and a CSV of right labels for a thousand
rows (kept in --folder for the next time), and tells the seconds and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import csv
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.labels.decide import softmax
from tests.running import CLI
from tests.vector_output import commit_vectors, empty_output

_SHARD, _DIM, _KNOWN = 100_000, 32, 1000
_CLASSES = [f"class {number}" for number in range(10)]


def make_output(folder: Path, rows: int) -> tuple[Path, Path]:
    """An output of so many rows, and the labels of some of them."""
    out, known = folder / f"label-{rows}", folder / f"label-{rows}.csv"
    if known.exists():
        return out, known
    output = empty_output(out, _CLASSES)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((len(_CLASSES), _DIM)).astype(np.float32)
    kinds = np.empty(0, np.int64)
    for number in range(rows // _SHARD):
        kinds = rng.integers(len(centres), size=_SHARD)
        vectors = centres[kinds] + rng.standard_normal((_SHARD, _DIM)).astype(np.float32)
        logits = (vectors @ centres.T / 4).astype(np.float32)
        best = logits.argmax(1).astype(np.int32)
        columns = {
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), len(centres)),
            "label_id": best,
            "label": [_CLASSES[kind] for kind in best],
            "score": softmax(logits).max(1),
        }
        commit_vectors(output, f"s{number:05d}", vectors, columns=columns)
    with known.open("w", newline="") as file:
        last = f"s{rows // _SHARD - 1:05d}"
        pairs = [(f"{last}#{row}", _CLASSES[kind]) for row, kind in enumerate(kinds[:_KNOWN])]
        csv.writer(file).writerows([("image_id", "label"), *pairs])
    return out, known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1000000,10000000")
    parser.add_argument("--methods", default="head,probe")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-label")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.folder.mkdir(exist_ok=True)
    for rows in map(int, args.rows.split(",")):  # in rising order: the peak is that of all processes so far
        out, known = make_output(args.folder, rows)
        for method in args.methods.split(","):
            words = [str(CLI), "label", str(out), "--from", method, "--labels", str(known)]
            started = time.monotonic()
            subprocess.run(words, check=True, capture_output=True)
            seconds = time.monotonic() - started
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            logging.info(f"{method}: {rows:,} rows, {seconds:.0f} s, {peak:.0f} MiB at most so far")


if __name__ == "__main__":
    main()
