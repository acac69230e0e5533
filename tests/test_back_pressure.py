"""Queues between stages are bounded in chunks, however small those are."""

import subprocess
import sys

import pytest

CODE = """
import sys, time
from pathlib import Path
import pyarrow as pa
import ray, ray.data
from ray.data import TaskPoolStrategy
from pipeline.back_pressure import bound_queues

most, folder = int(sys.argv[1]), Path(sys.argv[2])
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
context = ray.data.DataContext.get_current()
context.enable_progress_bars = False
context.target_max_block_size = context.target_min_block_size = 1
bound_queues(context, most)

def read(table):
    for number in range(60):
        (folder / str(number)).touch()
        yield pa.table({"number": [number]})

def consume(table):
    time.sleep(0.05)
    return pa.table({"ahead": [len(list(folder.iterdir())) - table["number"][0].as_py()]})

kinds = {"batch_size": 1, "batch_format": "pyarrow", "compute": TaskPoolStrategy(size=1)}
rows = ray.data.from_items([0]).map_batches(read, num_cpus=0.5, **kinds)
print(max(row["ahead"] for row in rows.map_batches(consume, num_cpus=0.4, **kinds).iter_rows()))
"""


def most_ahead(most, folder):
    folder.mkdir()
    words = [sys.executable, "-c", CODE, str(most), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.mark.slow
def test_a_stage_reads_only_so_far_ahead_of_the_next(tmp_path):
    """Beside those that wait: two at work, two in the generator's own buffer, one being made (Ray: 60)."""
    assert most_ahead(4, tmp_path / "made") <= 4 + 6
