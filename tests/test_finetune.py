"""`finetune` as a user runs it: one command, from class folders to a checkpoint that others load."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline.finetune.state import read_state
from pipeline.storage import Storage
from tests.labelled_images import CLASSES, write_folders
from tests.running import CLI, cli, leftovers, make_config, rows_of, run
from tests.small_training import small_config

CLOCKS = ("seconds", "images_per_s")


def write_config(path: Path, source: Path, output: Path, **sections) -> Path:
    config = small_config(source, output, **sections)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return path


def curve(output: Path) -> list[dict[str, float]]:
    history = json.loads((output / "metrics.json").read_text())["history"]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in history]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished training, and what the command said."""
    folder = tmp_path_factory.mktemp("finetune")
    images = write_folders(folder / "images", 240)
    config = write_config(folder / "config.yaml", images, folder / "model", train={"epochs": 8})
    done = cli("finetune", config, timeout_s=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_one_command_trains_and_tells_how_good_it_is(trained):
    folder, done = trained
    metrics = json.loads((folder / "model" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.8
    assert metrics["classes"] == list(CLASSES)
    assert metrics["train_images"] + metrics["validation_images"] == 240
    assert len(metrics["history"]) == 8
    assert f"{metrics['accuracy']:.2%}" in done.stderr
    assert "model.checkpoint=" in done.stderr
    assert leftovers(folder / "model") == []
    assert not (folder / "model" / "samples").exists()


def test_its_page_shows_the_curve_and_what_is_confused(trained):
    folder, _ = trained
    page = (folder / "model" / "training.html").read_text()
    assert page.count('class="curve"') == 5
    assert all(f"<bdi>{label}</bdi>" in page for label in CLASSES)
    assert "<script src" not in page
    card = (folder / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "image-classification"


def test_extract_and_transformers_load_the_result_as_it_is(trained, tmp_path):
    from transformers import AutoImageProcessor, CvtForImageClassification

    folder, _ = trained
    unseen = write_folders(tmp_path / "unseen", 60, seed=77)
    tally = run(make_config(unseen, folder / "model", tmp_path / "out"))
    assert tally.images == 60
    rows = rows_of(tmp_path / "out")
    right = np.mean([row["label"] == row["image_id"].partition("/")[0] for row in rows])
    assert right > 0.75
    model = CvtForImageClassification.from_pretrained(folder / "model")
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    images = [Image.open(unseen / row["image_id"]) for row in rows[:8]]
    with torch.inference_mode():
        logits = model(**processor(images, return_tensors="pt")).logits
    ours = torch.tensor([row["logits"] for row in rows[:8]])
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    assert list(model.config.id2label.values()) == list(CLASSES)


def test_a_finished_training_is_finished(trained):
    folder, _ = trained
    before = (folder / "model" / "metrics.json").read_bytes()
    done = cli("finetune", folder / "config.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this training is finished" in done.stderr
    assert (folder / "model" / "metrics.json").read_bytes() == before
    assert not (folder / "model" / "samples").exists()


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_curve(trained, tmp_path):
    folder, _ = trained
    section = {"compute": {"checkpoint_every_s": 0.2}, "train": {"epochs": 8}}
    config = write_config(tmp_path / "config.yaml", folder / "images", tmp_path / "model", **section)
    for step in (20, 45):
        kill_after(config, tmp_path / "model", step)
    done = cli("finetune", config, timeout_s=400)
    assert done.returncode == 0, done.stderr[-3000:]
    mine, theirs = curve(tmp_path / "model"), curve(folder / "model")
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for name in ("train_loss", "validation_loss"):
        values = [[row[name] for row in rows] for rows in (mine, theirs)]
        np.testing.assert_allclose(*values, atol=1e-4)


def kill_after(config: Path, output: Path, step: int) -> None:
    """Start a training, and kill -9 its process once a state of this step or later is there."""
    process = subprocess.Popen([str(CLI), "finetune", str(config)], stderr=subprocess.DEVNULL)
    patience = time.monotonic() + 120
    while time.monotonic() < patience and process.poll() is None:
        steps = [int(path.stem.rpartition("-")[2]) for path in (output / "checkpoints").glob("step-*")]
        if max(steps, default=0) >= step:
            break
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)


def wait_for(path: Path) -> None:
    patience = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < patience, f"no {path}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_ends_it_with_its_state_written(trained, tmp_path):
    from pipeline.lease import acquire

    folder, _ = trained
    section = {"compute": {"checkpoint_every_s": 3600}, "train": {"epochs": 400}}
    config = write_config(tmp_path / "config.yaml", folder / "images", tmp_path / "model", **section)
    process = subprocess.Popen([str(CLI), "finetune", str(config)], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / "model" / "checkpoints" / "best.safetensors")  # after the first epoch
        assert not list((tmp_path / "model" / "checkpoints").glob("step-*"))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM, said
    finally:
        process.kill()
    assert list((tmp_path / "model" / "checkpoints").glob("step-*"))
    acquire(Storage(str(tmp_path / "model")), "next", 120).release()  # at once: nobody alive holds it


def test_a_busy_output_is_refused(trained, tmp_path):
    from pipeline.lease import acquire

    folder, _ = trained
    lease = acquire(Storage(str(tmp_path / "model")), "another", 120)
    try:
        config = write_config(tmp_path / "config.yaml", folder / "images", tmp_path / "model")
        assert cli("finetune", config).returncode == 4
    finally:
        lease.release()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "train.epoch: unknown key; did you mean epochs?"),
        ("train.batch_size=0", "train.batch_size: found 0"),
        (
            "augment.policy=autoaugment",
            "augment.policy: found 'autoaugment'; allowed: 'none', 'randaugment'",
        ),
        ("input.uri=/nowhere/at/all", "input.uri: /nowhere/at/all does not exist"),
        ("input.label_column=kind", "input.label_column: loose images are labelled by the folder"),
    ],
)
def test_a_bad_configuration_is_told_by_its_key(trained, tmp_path, override, message):
    folder, _ = trained
    done = cli("finetune", folder / "config.yaml", f"output.uri={tmp_path / 'model'}", override)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_workers_of_ray_train_what_one_trains(trained, tmp_path):
    folder, _ = trained
    section = {"compute": {"workers": 2}, "train": {"epochs": 8}}
    config = write_config(tmp_path / "config.yaml", folder / "images", tmp_path / "model", **section)
    done = cli("finetune", config, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    mine, theirs = curve(tmp_path / "model"), curve(folder / "model")
    for name in ("train_loss", "validation_loss"):
        values = [[row[name] for row in rows] for rows in (mine, theirs)]
        np.testing.assert_allclose(*values, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("max_failures", [3, 0])
def test_a_killed_worker_is_started_again_as_often_as_allowed(trained, tmp_path, max_failures):
    folder, _ = trained
    compute = {"checkpoint_every_s": 0.2, "max_failures": max_failures}
    section = {"compute": compute, "train": {"epochs": 60}}
    config = write_config(tmp_path / "config.yaml", folder / "images", tmp_path / "model", **section)
    process = subprocess.Popen([str(CLI), "finetune", str(config)], stderr=subprocess.PIPE, text=True)
    try:
        patience = time.monotonic() + 120
        while time.monotonic() < patience and not list((tmp_path / "model").glob("checkpoints/step-*")):
            time.sleep(0.1)
        worker = subprocess.run(
            ["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=True
        ).stdout.split()
        parents = {pid: ancestors(int(pid)) for pid in worker}
        mine = [int(pid) for pid, above in parents.items() if process.pid in above]
        assert mine
        for pid in mine:
            subprocess.run(["kill", "-9", str(pid)], check=False)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=240) == (0 if max_failures else 1), said[-3000:]
    finally:
        process.kill()
    assert read_state_of(tmp_path / "model").finished == bool(max_failures)
    if not max_failures:
        assert "error: workers died once over the same work" in said
        assert "Traceback" not in said


def ancestors(pid: int) -> set[int]:
    """The processes that a process descends from."""
    found: set[int] = set()
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.add(pid)
    return found


def read_state_of(output: Path):
    from safetensors import safe_open

    from pipeline.finetune.state import Progress

    newest = max((output / "checkpoints").glob("step-*"))
    with safe_open(newest, "pt") as file:
        digest = json.loads(file.metadata()["cvt-pipeline"])["digest"]
    state = read_state(Storage(str(output)), digest)
    assert state is not None
    assert isinstance(state[0], Progress)
    return state[0]
