"""`label --suggest` beside random choice, at equal numbers of labels: how good a probe of them is.

    python tests/bench/bench_suggest.py OUTPUT --truth label_name [--add 100,200,400]

Begins with `start` labels drawn at random, adds labels that `--suggest` names or that are drawn, and tells
the accuracy of the probe on the images that neither has seen. A figure is the mean of the seeds, with the
standard deviation of the difference. What it writes into the output's labels/ is a copy's.
"""

from __future__ import annotations

import argparse
import csv
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.config import LabelConfig
from pipeline.labels.make import make_labels
from pipeline.labels.suggest import FILE, FOLDER, suggest
from pipeline.storage import Storage


def write(path: Path, ids: list[str], truth: dict[str, str]) -> LabelConfig:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image_id", "label"), *((it, truth[it]) for it in ids)])
    return LabelConfig(method="probe", labels=str(path))


def suggested(output: Storage, config: LabelConfig, number: int) -> list[str]:
    version = suggest(output, config, number)["version"]
    with Path(output.path(f"{FOLDER}/{version}/{FILE}")).open(newline="") as file:
        return [row["image_id"] for row in csv.DictReader(file)]


def accuracy(output: Storage, config: LabelConfig, truth: dict[str, str], seen: set[str]) -> float:
    version = make_labels(output, config)["version"]
    labels = pq.read_table(output.path(f"labels/{version}/labels.parquet"), columns=["image_id", "label"])
    pairs = zip(*(labels.column(n).to_pylist() for n in (0, 1)), strict=True)
    return float(np.mean([truth[it] == label for it, label in pairs if it not in seen]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--truth", required=True, help="the metadata column with the right labels")
    parser.add_argument("--start", type=int, default=100)
    parser.add_argument("--add", default="100,200,400")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = ds.dataset(args.output / "embeddings").to_table(columns=["image_id", args.truth])
    truth = dict(zip(*(rows.column(n).to_pylist() for n in (0, 1)), strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "output"
        shutil.copytree(args.output, copy, ignore=shutil.ignore_patterns("labels", "index", "dedup"))
        output, labels = Storage(str(copy)), Path(scratch) / "labels.csv"
        for add in map(int, args.add.split(",")):
            figures = []
            for seed in range(args.seeds):
                order = [str(it) for it in np.random.default_rng(seed).permutation(sorted(truth))]
                start, rest = order[: args.start], order[args.start :]
                chosen = suggested(output, write(labels, start, truth), add)
                drawn = rest[:add]
                seen = {*start, *chosen, *drawn}
                by = [
                    accuracy(output, write(labels, start + it, truth), truth, seen)
                    for it in (chosen, drawn)
                ]
                figures.append(by)
            means, spread = np.mean(figures, axis=0), np.std([a - b for a, b in figures], ddof=1)
            logging.info(
                "%d + %d labels: suggested %.4f, random %.4f, difference %+.4f (sd %.4f, %d seeds)",
                args.start,
                add,
                *means,
                means[0] - means[1],
                spread,
                args.seeds,
            )


if __name__ == "__main__":
    main()
