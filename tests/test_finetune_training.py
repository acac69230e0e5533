"""A training goes on as if it had not been interrupted, and does not depend on how many share it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from ray.exceptions import RayActorError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cvt_model.checkpoint import resolve_checkpoint
from pipeline.errors import BusyError, ConfigError, LimitError, OutputError, StorageError, WorkersDiedError
from pipeline.finetune.fit import Placement, fit, in_words
from pipeline.finetune.job import check_batch, place_workers
from pipeline.finetune.network import check_apart, find_start
from pipeline.finetune.results import write_results
from pipeline.finetune.sources import Found
from pipeline.finetune.state import Progress, check_state, read_best, read_state, write_state
from pipeline.lease import acquire
from pipeline.stop import Stop
from pipeline.storage import Storage
from tests.labelled_images import NETWORK, PREPROCESSING, write_folders
from tests.s3_server import free_port
from tests.small_training import finetune_here, small_config, small_job, train

ROOT = Path(__file__).parent.parent
CLOCKS = ("seconds", "images_per_s")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("labelled"), 120)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """A job and its finished training."""
    job = small_job(small_config(images, tmp_path_factory.mktemp("undisturbed") / "out"))
    return job, train(job)


def curve(training_or_progress):
    progress = getattr(training_or_progress, "progress", training_or_progress)
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in progress.history]


def final_tensors(job):
    state = read_state(job.output, job.digest)
    assert state is not None
    return state[1]


def test_it_learns(undisturbed):
    _, training = undisturbed
    assert training.progress.finished
    assert len(training.progress.history) == 4
    assert training.progress.best_accuracy > 0.6  # a third would be chance
    assert curve(training)[-1]["train_loss"] < curve(training)[0]["train_loss"]


def test_three_interruptions_change_nothing(undisturbed, images, tmp_path):
    job, training = undisturbed
    other = small_job(small_config(images, tmp_path / "out"))
    assert other.digest == job.digest
    total = other.schedule.total_steps
    for last in (3, 4, total - 2):  # within an epoch, directly after, near the end
        stopped = train(other, command=lambda it, last=last: "stop" if it.progress.step >= last else "go")
        assert stopped.progress.step == last
    finished = train(other)
    assert curve(finished) == curve(training)
    mine, theirs = final_tensors(other), final_tensors(job)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=0)


def test_what_was_not_saved_is_done_again(undisturbed, images, tmp_path):
    """As after a kill -9: steps beyond the newest state are lost, and repeated the same."""
    _, training = undisturbed
    other = small_job(small_config(images, tmp_path / "out"))

    class Killed(Exception):  # noqa: N818
        pass

    def save_and_die(it):
        if it.progress.step == 5:
            return "save"
        if it.progress.step == 9:
            raise Killed
        return "go"

    with pytest.raises(Killed):
        train(other, command=save_and_die)
    state = read_state(other.output, other.digest)
    assert state is not None
    assert state[0].step == 5
    assert curve(train(other)) == curve(training)


def test_two_workers_train_the_network_that_one_trains(undisturbed, images, tmp_path):
    job, training = undisturbed
    config = small_config(images, tmp_path / "out")
    small_job(config)  # which prepares the samples for both
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = [sys.executable, "-m", "tests.small_training", str(path)]
    port = str(free_port())
    workers = [subprocess.Popen([*words, str(rank), "2", port], cwd=ROOT) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    state = read_state(Storage(config.output.uri), job.digest)
    assert state is not None
    progress, tensors = state
    expected = final_tensors(job)
    for name in expected:
        if name.startswith("model/") and expected[name].is_floating_point():
            torch.testing.assert_close(tensors[name], expected[name], rtol=5e-3, atol=5e-3, msg=name)
    for mine, theirs in zip(curve(progress), curve(training), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=2e-3)
        assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=2e-2)


def test_a_state_that_is_not_whole_is_passed_over(undisturbed, tmp_path):
    job, _ = undisturbed
    shutil.copytree(job.output.uri, tmp_path / "out")
    other = replace(job, output=Storage(str(tmp_path / "out")))
    write_state(other.output, Progress(job.digest, step=3), {"x": torch.ones(1000)})
    write_state(other.output, Progress(job.digest, step=4), {"x": torch.ones(1000)})
    newest = max((tmp_path / "out" / "checkpoints").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    state = read_state(other.output, job.digest)
    assert state is not None
    assert state[0].step < job.schedule.total_steps


def test_a_training_that_diverges_ends_in_words_and_keeps_what_was_before(undisturbed, images, tmp_path):
    _, training = undisturbed
    job = small_job(small_config(images, tmp_path / "out"))

    def spoil(it):
        if it.progress.step == 8:  # in the second epoch
            for parameter in it.model.parameters():
                parameter.data.fill_(math.nan)
        return "save" if it.progress.step == 7 else "go"

    with pytest.raises(
        LimitError, match=r"loss is not finite at epoch 2.*lower train\.learning_rate.*delete"
    ):
        train(job, command=spoil)
    facts, weights, _ = read_best(job.output)
    assert facts["step"] == training.progress.history[0]["step"]
    assert all(value.isfinite().all() for value in weights.values())
    assert curve(train(job)) == curve(training), "the newest state is from before"


def test_a_state_that_is_not_finite_is_not_kept(images, tmp_path):
    section = {"learning_rate": 1e9, "warmup_epochs": 0, "clip_grad_norm": None}
    job = small_job(small_config(images, tmp_path / "out", train=section))
    with pytest.raises(LimitError, match="loss is not finite at epoch 0"):
        train(job, command=lambda it: "save" if it.progress.step == 4 else "go")
    assert read_state(job.output, job.digest) is None


def test_another_training_s_state_is_refused(undisturbed, images):
    job, _ = undisturbed
    other = small_job(small_config(images, Path(job.output.uri), train={"learning_rate": 1e-3}))
    assert other.digest != job.digest
    with pytest.raises(OutputError, match="holds another training"):
        train(other)


def test_another_training_is_told_before_anything_is_done_for_it(
    undisturbed, images, tmp_path, monkeypatch
):
    job, _ = undisturbed
    shutil.copytree(job.output.uri, tmp_path / "out")
    monkeypatch.setattr("tests.small_training.train", lambda _: pytest.fail("workers were started"))
    more = write_folders(tmp_path / "in", 60)
    with pytest.raises(OutputError, match="holds another training"):
        finetune_here(small_config(more, tmp_path / "out"), monkeypatch)
    monkeypatch.setattr("pipeline.finetune.job.prepare", lambda *_: pytest.fail("images were read"))
    with pytest.raises(OutputError, match="holds another training"):
        finetune_here(small_config(more, tmp_path / "out", train={"learning_rate": 1e-4}), monkeypatch)


def test_an_earlier_version_s_state_is_known_by_its_digest_alone(tmp_path):
    output = Storage(str(tmp_path))
    write_state(output, Progress("images and recipe"), {"x": torch.ones(1)})
    check_state(output, "recipe")
    check_state(output, "recipe", "images and recipe")
    with pytest.raises(OutputError, match="holds another training"):
        check_state(output, "recipe", "others")


def test_images_that_are_only_copied_anew_are_the_same_training(undisturbed, images, tmp_path):
    job, _ = undisturbed
    shutil.copytree(images, tmp_path / "in")
    files = sorted((tmp_path / "in").rglob("*.*"))
    for number, file in enumerate(files):
        os.utime(file, (1e9 + number, 1e9 + number))
    assert small_job(small_config(tmp_path / "in", tmp_path / "out")).digest == job.digest
    files[0].write_bytes(files[-1].read_bytes())
    assert small_job(small_config(tmp_path / "in", tmp_path / "other")).digest != job.digest


def test_best_and_last_are_kept_as_checkpoints_with_the_classes(undisturbed):
    job, training = undisturbed
    metrics = write_results(job, Found(list(job.classes)), "asked")
    assert metrics["accuracy"] == training.progress.best_accuracy
    assert sum(map(sum, metrics["confusion"])) == metrics["validation_images"] == len(job.validation)
    facts, best, _ = read_best(job.output)
    assert facts["step"] == training.progress.best_step
    for folder, weights in (("", best), ("last", training.kept_state())):
        checkpoint = resolve_checkpoint(str(Path(job.output.uri) / folder))
        assert list(checkpoint.config.id2label.values()) == list(job.classes)
        assert checkpoint.processor == job.start.processor
        for name, value in checkpoint.load().state_dict().items():
            torch.testing.assert_close(value, weights[name])


def test_a_curve_with_a_gap_is_shown_and_written_as_null(undisturbed, tmp_path):
    """As earlier versions left it, which went on where a loss was not finite."""
    shutil.copytree(undisturbed[0].output.uri, tmp_path / "out")
    job = replace(undisturbed[0], output=Storage(str(tmp_path / "out")))
    progress, tensors = read_state(job.output, job.digest)
    progress.history[1]["train_loss"] = progress.history[-1]["validation_loss"] = math.nan
    write_state(job.output, progress, tensors)
    write_results(job, Found(list(job.classes)), "asked")
    text = (tmp_path / "out" / "metrics.json").read_text()
    history = json.loads(text, parse_constant=pytest.fail)["history"]
    assert history[1]["train_loss"] is history[-1]["validation_loss"] is None
    page = (tmp_path / "out" / "training.html").read_text()
    assert page.count('class="curve"') == 5
    assert "validation loss –" in page
    assert "nan" not in page


def test_the_best_mixture_with_the_checkpoint_s_weights_is_kept(undisturbed, images, tmp_path):
    first, _ = undisturbed
    write_results(first, Found(list(first.classes)), "asked")
    section = {"epochs": 1, "learning_rate": 3e-2, "ema_decay": None, "interpolate": [0.25, 0.5]}
    model = {"checkpoint": first.output.uri}
    config = small_config(images, tmp_path / "out", model=model, train=section)
    job = small_job(config)
    train(job)
    metrics = write_results(job, Found(list(job.classes)), "asked")
    begun = resolve_checkpoint(first.output.uri).load().state_dict()
    _, trained, _ = read_best(job.output)
    judge, accuracies = train(job), {}
    for share in (1.0, 0.5, 0.25):
        mixed = {
            k: begun[k] + share * (v - begun[k]) if v.is_floating_point() else v for k, v in trained.items()
        }
        verdict = judge._judged(mixed)
        accuracies[share] = verdict.accuracy, -verdict.loss
    best = max(accuracies, key=lambda share: accuracies[share])
    assert metrics["interpolation"]["share"] == best < 1, (
        "a rate as high as this spoils the trained weights"
    )
    assert metrics["accuracy"] == accuracies[best][0]
    tried = {it["share"]: it["validation_accuracy"] for it in metrics["interpolation"]["tried"]}
    assert tried == {share: accuracy for share, (accuracy, _) in accuracies.items()}
    for name, value in resolve_checkpoint(job.output.uri).load().state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, begun[name] + best * (trained[name] - begun[name]))
    assert "100% trained weights" in (tmp_path / "out" / "training.html").read_text()
    assert f"{best:.0%} of them" in (tmp_path / "out" / "README.md").read_text()
    plain = small_config(images, tmp_path / "out", model=model, train={**section, "interpolate": []})
    assert small_job(plain).digest == job.digest, "it can be asked for when the training has ended"


def test_weights_of_other_classes_are_not_mixed(undisturbed, images, tmp_path):
    first, _ = undisturbed
    write_results(first, Found(list(first.classes)), "asked")
    (tmp_path / "in").mkdir()
    for label in ("renamed", "other"):
        shutil.copytree(images / first.classes[0], tmp_path / "in" / label)
    section = {"interpolate": [0.5]}
    config = small_config(
        tmp_path / "in", tmp_path / "out", model={"checkpoint": first.output.uri}, train=section
    )
    with pytest.raises(ConfigError, match=r"train\.interpolate: .* does not classify into the 2 classes"):
        small_job(config)
    with pytest.raises(ValueError, match=r"train\.interpolate: needs model\.checkpoint"):
        small_config(images, tmp_path / "out", train=section)


@pytest.mark.parametrize("place", ["", "last", "last/model.safetensors", "../link"])
def test_what_it_begins_with_is_not_overwritten(undisturbed, images, tmp_path, monkeypatch, place):
    output = tmp_path / "out"
    shutil.copytree(undisturbed[0].output.uri, output)
    first = replace(undisturbed[0], output=Storage(str(output)))
    write_results(first, Found(list(first.classes)), "asked")
    (tmp_path / "link").symlink_to(output)
    config = small_config(images, output, model={"checkpoint": str(output / place)})
    with pytest.raises(ConfigError, match=r"output\.uri: .* holds model\.checkpoint"):
        finetune_here(config, monkeypatch)
    config = small_config(images, output / "next", model={"checkpoint": str(output / place)})
    check_apart(find_start(config.model), Storage(config.output.uri))


def test_a_frozen_backbone_stays_as_it_was_and_parts_of_a_batch_are_one_batch(images, tmp_path):
    finished = []
    for accumulate in (1, 4):
        train_section = {"freeze": "backbone", "accumulate": accumulate, "epochs": 1, "ema_decay": None}
        job = small_job(small_config(images, tmp_path / str(accumulate), train=train_section))
        before = job.start.build(job.classes, job.config.train.seed).state_dict()
        state = train(job).model.state_dict()
        moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
        assert moved == {"layernorm.weight", "layernorm.bias", "classifier.weight", "classifier.bias"}
        finished.append(state)
    for name in finished[0]:
        torch.testing.assert_close(finished[0][name], finished[1][name], rtol=1e-4, atol=1e-5)


def test_it_ends_early_where_nothing_gets_better(images, tmp_path):
    section = {"epochs": 40, "learning_rate": 1e-9, "early_stop_epochs": 2}
    job = small_job(small_config(images, tmp_path / "out", train=section))
    training = train(job)
    assert training.progress.finished
    assert len(training.progress.history) <= 6
    assert train(job).progress.step == training.progress.step, "and stays as it ended"


def test_smaller_images_come_first(images, tmp_path):
    section = {"sizes": [[0.25, 8], [0.5, 12]]}
    job = small_job(small_config(images, tmp_path / "out", augment=section))
    total = job.schedule.total_steps
    sizes = [job.size_of(step) for step in range(total)]
    assert sizes == sorted(sizes)
    assert [sizes.count(size) / total for size in (8, 12)] == pytest.approx([0.25, 0.25], abs=1 / total)
    assert sizes[-1] == 16


def test_a_checkpoint_s_head_goes_where_the_classes_differ_and_stays_where_they_do_not(
    undisturbed, images, tmp_path
):
    job, _ = undisturbed
    write_results(job, Found(list(job.classes)), "asked")
    model = {"checkpoint": job.output.uri}
    start = find_start(small_config(images, tmp_path / "out", model=model).model)
    weights = resolve_checkpoint(job.output.uri).load().state_dict()
    same = start.build(start.classes(sorted(job.classes)), 0).state_dict()
    torch.testing.assert_close(same["classifier.weight"], weights["classifier.weight"])
    other = start.build(start.classes(["cat", "dog"]), 0).state_dict()
    assert other["classifier.weight"].shape == (2, 32)
    torch.testing.assert_close(other["layernorm.weight"], weights["layernorm.weight"])


def test_a_batch_that_cannot_be_shared_is_refused(images, tmp_path):
    config = small_config(images, tmp_path / "out", train={"batch_size": 18})
    check_batch(config, 3)
    with pytest.raises(
        ConfigError, match=r"train\.batch_size: 18 is not a multiple of 4: 2 workers.*pairs"
    ):
        check_batch(config, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "either checkpoint"),
        ({"config": NETWORK}, "preprocessing: a network from scratch needs it"),
        ({"config": {"depth": [1]}, "preprocessing": PREPROCESSING}, "1 stages|for 1"),
        ({"checkpoint": "nowhere"}, "nowhere: no such"),
        (
            {
                "config": NETWORK,
                "preprocessing": {"do_center_crop": True, "crop_size": {"height": 8, "width": 9}},
            },
            "square",
        ),
    ],
)
def test_a_network_that_cannot_be_is_refused(images, tmp_path, model, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        find_start(small_config(images, tmp_path / "out", model=model).model)


@pytest.mark.parametrize(
    ("gpus", "cores", "compute", "expected"),
    [
        (0, 8, {}, (1, False, 8)),
        (0, 8, {"workers": 4}, (4, False, 2)),
        (4, 32, {}, (4, True, 8)),
        (4, 32, {"workers": 2}, (2, True, 16)),
        (4, 32, {"worker_gpus": 0}, (1, False, 32)),
        (0, 2, {"workers": 3}, (3, False, 1)),
    ],
)
def test_workers_are_one_a_gpu_or_one_of_all_cores(images, tmp_path, gpus, cores, compute, expected):
    config = small_config(images, tmp_path / "out", compute=compute)
    placed = place_workers(config, SimpleNamespace(num_gpus=gpus, cores=cores))
    assert (placed.num_workers, placed.on_gpu, placed.num_threads) == expected


@pytest.mark.parametrize(
    ("gpus", "compute", "message"),
    [(0, {"worker_gpus": 1}, "the cluster has no GPU"), (2, {"workers": 3}, "3 workers need a GPU each")],
)
def test_more_gpus_than_there_are_cannot_be_had(images, tmp_path, gpus, compute, message):
    config = small_config(images, tmp_path / "out", compute=compute)
    with pytest.raises(ConfigError, match=message):
        place_workers(config, SimpleNamespace(num_gpus=gpus, cores=8))


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (StorageError("the disk is full"), StorageError, "the disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory"), ConfigError, "train.accumulate: 16 images"),
        (WorkerHealthCheckFailedError("rank 0", RayActorError()), WorkersDiedError, "workers died 4 times"),
        (ZeroDivisionError("a bug"), WorkerGroupError, "a bug"),
    ],
)
def test_what_ends_the_workers_is_told_in_words(undisturbed, cause, kind, message):
    error = in_words(WorkerGroupError(f"rank 0: {cause}", {0: cause}), undisturbed[0])
    assert type(error) is kind
    assert message in str(error)


class Here:
    """An actor in this process: calls are made at once, and what they give is its own reference."""

    def __init__(self, kind):
        self._it = kind()

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._it, name))


@pytest.mark.parametrize("raised_by", ["the worker", "a task of its"])
def test_what_no_new_start_mends_ends_it_at_once_and_in_its_words(undisturbed, monkeypatch, raised_by):
    error = StorageError("the disk is full")
    if raised_by != "the worker":
        error = RayTaskError("load", "a long traceback", error).as_instanceof_cause()
    starts, others = [], threading.Event()

    def fail(settings):
        starts.append(settings)
        raise error

    class Trainer:
        def __init__(self, work, *, train_loop_config, **_):
            self._work, self._settings = work, train_loop_config

        def fit(self):
            for _ in range(3):
                with contextlib.suppress(StorageError):
                    self._work(self._settings)
                    others.wait(60)  # for the worker that failed
                    return

    monkeypatch.setattr("ray.remote", lambda **_: lambda kind: SimpleNamespace(remote=lambda: Here(kind)))
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("pipeline.finetune.fit._STOP_S", 0.1)
    monkeypatch.setattr("pipeline.finetune.fit._train", fail)
    monkeypatch.setattr("pipeline.finetune.fit.TorchTrainer", Trainer)
    with pytest.raises(StorageError, match=r"^the disk is full$"):
        fit(undisturbed[0], Placement(2, False, 1, 1), Stop(), lambda values: None)
    others.set()
    assert len(starts) == 1


def test_what_a_killed_run_left_is_deleted(images, tmp_path, monkeypatch):
    output = tmp_path / "out"
    parts = [output / folder / ".tmp-0123" for folder in ("", "checkpoints", "last", "notes")]
    for part in parts:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"half of a")
    delete_folder = Storage.delete_folder

    def die(output, folder):
        if folder == "samples":
            raise KeyboardInterrupt
        delete_folder(output, folder)

    config = small_config(images, output, train={"epochs": 0.2})
    monkeypatch.setattr(Storage, "delete_folder", die)
    with pytest.raises(KeyboardInterrupt):
        finetune_here(config, monkeypatch)
    assert [part.exists() for part in parts] == [False, False, False, True], "notes are not ours"
    assert (output / "samples").exists()
    monkeypatch.setattr(Storage, "delete_folder", delete_folder)
    finetune_here(config, monkeypatch)
    assert not (output / "samples").exists()


def test_nobody_else_begins_until_the_results_are_written(images, tmp_path, monkeypatch):
    config = small_config(images, tmp_path / "out", train={"epochs": 0.2})

    def write_while_another_tries(*args):
        with pytest.raises(BusyError):
            acquire(Storage(config.output.uri), "another", 120)
        return write_results(*args)

    monkeypatch.setattr("pipeline.finetune.results.write_results", write_while_another_tries)
    assert finetune_here(config, monkeypatch).metrics["steps"] == 2
    acquire(Storage(config.output.uri), "another", 120).release()


def test_float16_needs_a_gpu(images, tmp_path):
    model = {"config": NETWORK, "preprocessing": PREPROCESSING, "precision": "float16"}
    with pytest.raises(ConfigError, match="float16 trains on GPUs only"):
        small_job(small_config(images, tmp_path / "out", model=model))
