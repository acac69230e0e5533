"""A step has the same images however they are made: one by one, by threads, by tasks of Ray Data."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.finetune.batches import Order, between_steps
from pipeline.finetune.together import Share
from tests.labelled_images import write_folders
from tests.small_training import small_config, small_job

ROOT = Path(__file__).parent.parent
STEPS = [(3, 16), (4, 16), (5, 12), (40, 16)]
CODE = """
import sys
from pathlib import Path
import numpy as np, ray
from pipeline.finetune.batches import stream
from pipeline.finetune.together import Share
from tests.small_training import small_config, small_job
from tests.test_finetune_batches import STEPS

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
job = small_job(small_config(Path(sys.argv[1]), Path(sys.argv[2])))
for batch in stream(job.loader(Share(1, 2)), iter(STEPS), 2):
    np.savez(f"{sys.argv[2]}/{batch.step}.npz", pixels=batch.pixels_BHWC, labels=batch.labels_B)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    return small_job(small_config(write_folders(folder / "in", 120), folder / "out"))


@pytest.mark.slow
def test_tasks_of_ray_data_make_what_threads_make(job, tmp_path):
    source = Path(job.output.uri).parent / "in"
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(source), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    batches = list(between_steps(job.loader(Share(1, 2)), iter(STEPS), 2))
    assert [(batch.step, batch.pixels_BHWC.shape[1]) for batch in batches] == STEPS
    for batch in batches:
        made = np.load(tmp_path / f"{batch.step}.npz")
        np.testing.assert_array_equal(made["pixels"], batch.pixels_BHWC)
        np.testing.assert_array_equal(made["labels"], batch.labels_B)


def test_workers_share_a_step(job):
    whole = job.loader(Share(0, 1)).load(7, 16)
    with ThreadPoolExecutor(3) as pool:
        parts = [job.loader(Share(rank, 2)).load(7, 16, pool.map) for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate([it.pixels_BHWC for it in parts]), whole.pixels_BHWC)
    np.testing.assert_array_equal(np.concatenate([it.labels_B for it in parts]), whole.labels_B)


def test_every_epoch_has_every_image_once_in_another_order():
    order = Order(50, 8, seed=5)
    epochs = [[order.sample(place) for place in range(50 * n, 50 * n + 50)] for n in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert all(one != other for one, other in itertools.combinations(epochs, 2))
