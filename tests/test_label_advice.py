"""Which images to label next, and which given labels are probably wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commits import CommitLog, remove_commits
from pipeline.config import LabelConfig
from pipeline.errors import BusyError, ConfigError, InputError
from pipeline.labels import cross_validation, methods, suspects
from pipeline.labels.cross_validation import ALWAYS_TRAINED, fold_of
from pipeline.labels.make import make_labels
from pipeline.labels.methods import chosen_rows, vectors_of
from pipeline.labels.reviews import Decision, record
from pipeline.labels.suggest import suggest
from pipeline.labels.suspects import _held_against, find_suspects
from pipeline.schema import SUSPECTS
from pipeline.storage import Storage
from tests.conftest import WriteImages
from tests.running import cli, make_config, run
from tests.test_evaluate import CLASSES, make
from tests.test_labels import write_labels
from tests.vector_output import commit_vectors, empty_output

DIM = 16


def clusters(count: int, noise: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around one centre a class, and their classes."""
    rng = np.random.default_rng(3)
    centres = np.random.default_rng(99).normal(size=(len(CLASSES), DIM))
    kinds = rng.integers(len(CLASSES), size=count)
    return (centres[kinds] + rng.normal(scale=noise, size=(count, DIM))).astype(np.float32), kinds


def flipped(folder: Path, count: int, share: float) -> tuple[Storage, Path, set[str]]:
    """An output, a file of labels of which some are wrong, and the ids of those."""
    vectors, kinds = clusters(count)
    rng = np.random.default_rng(4)
    wrong = rng.choice(count, round(share * count), replace=False)
    given = kinds.copy()
    given[wrong] = (kinds[wrong] + rng.integers(1, len(CLASSES), size=len(wrong))) % len(CLASSES)
    output = empty_output(folder / "out", CLASSES)
    commit_vectors(output, "a", vectors[: count // 2])
    commit_vectors(output, "b", vectors[count // 2 :])
    half = count // 2
    ids = [f"a#{n}" if n < half else f"b#{n - half}" for n in range(count)]
    write_labels(folder / "labels.csv", ids, [CLASSES[n] for n in given])
    return output, folder / "labels.csv", {ids[n] for n in wrong}


def suspects_of(output: Storage) -> pa.Table:
    version = output.read_bytes("labels/suspects/CURRENT").decode()
    return pq.read_table(output.path(f"labels/suspects/{version}/suspects.parquet"))


@pytest.mark.parametrize("most_labelled", [20_000, 150])
def test_wrong_labels_come_first(tmp_path: Path, most_labelled: int) -> None:
    output, path, wrong = flipped(tmp_path, 1000, 0.05)
    summary = find_suspects(output, LabelConfig(labels=str(path), most_labelled=most_labelled))
    table = suspects_of(output)
    assert table.schema.equals(SUSPECTS)
    assert table.column("rank").to_pylist() == list(range(1, 1001))
    rows = table.to_pylist()
    assert len({row["image_id"] for row in rows}) == 1000
    first = {row["image_id"] for row in rows[:80]}
    assert len(first & wrong) >= 0.95 * len(wrong)
    flagged = {row["image_id"] for row in rows if row["flagged"]}
    assert len(flagged & wrong) >= 0.75 * len(wrong)  # flags are sure of themselves
    assert len(flagged - wrong) <= 10
    assert summary["flagged"] == len(flagged)
    margins = [row["p_given"] - row["p_suggested"] for row in rows]
    assert margins == sorted(margins)
    assert all(row["given"] != row["suggested"] for row in rows)


def test_what_is_suggested_is_mostly_the_truth(tmp_path: Path) -> None:
    output, path, wrong = flipped(tmp_path, 1000, 0.05)
    find_suspects(output, LabelConfig(labels=str(path)))
    _, kinds = clusters(1000)
    truth = {f"{'ab'[n // 500]}#{n % 500}": CLASSES[kind] for n, kind in enumerate(kinds)}
    rows = [row for row in suspects_of(output).to_pylist() if row["image_id"] in wrong]
    assert np.mean([row["suggested"] == truth[row["image_id"]] for row in rows]) > 0.8


def test_no_label_is_judged_by_a_probe_that_has_seen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more dimensions than images a probe that is free to knows by heart what it has seen."""
    monkeypatch.setattr(cross_validation, "STRENGTHS", (10.0,))
    rng = np.random.default_rng(0)
    output = empty_output(tmp_path / "out", CLASSES)
    commit_vectors(output, "a", rng.normal(size=(60, 200)).astype(np.float32))
    kinds = [CLASSES[n] for n in rng.integers(2, size=60)]
    write_labels(tmp_path / "labels.csv", [f"a#{n}" for n in range(60)], kinds)
    find_suspects(output, LabelConfig(labels=str(tmp_path / "labels.csv")))
    rows = suspects_of(output).to_pylist()
    assert len(rows) == 60
    assert 0.3 < np.mean([row["p_given"] > row["p_suggested"] for row in rows]) < 0.7


def test_flags_are_confident_learning_s() -> None:
    """By hand: classes are as likely as 0.6, 0.5 and 0.9 of their own images."""
    p = np.array(
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.62, 0.3, 0.08], [0.45, 0.55, 0.0]],
        np.float32,
    )
    given = np.array([0, 0, 0, 1, 1], np.int32)
    thresholds = np.array([0.6, 0.5, 0.9], np.float32)
    suggested, p_given, p_suggested, flags = _held_against(given, p, thresholds)
    assert flags.tolist() == [False, True, False, True, False]
    assert suggested.tolist() == [1, 1, 2, 0, 0]
    np.testing.assert_allclose(p_given, [0.7, 0.1, 0.3, 0.3, 0.55])
    np.testing.assert_allclose(p_suggested, [0.2, 0.8, 0.4, 0.62, 0.45])


def test_a_class_s_only_image_is_neither_judged_nor_suggested_for_others(tmp_path: Path) -> None:
    output, path, _ = flipped(tmp_path, 200, 0.0)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1].split(",")[0] + ",rare"]) + "\n")
    summary = find_suspects(output, LabelConfig(labels=str(path)))
    rows = suspects_of(output).to_pylist()
    assert summary["labelled"] == len(rows) == 199
    assert "rare" in summary["classes"]
    assert "rare" not in {row["suggested"] for row in rows if row["flagged"]}
    assert summary["flagged"] < 10


def test_folds_of_which_no_row_was_drawn_are_judged_too(tmp_path: Path) -> None:
    output, path, _ = flipped(tmp_path, 400, 0.05)
    config = LabelConfig(labels=str(path), most_labelled=12, folds=20)
    assert find_suspects(output, config)["labelled"] == 400


def test_folds_share_every_class_and_leave_its_only_image_out() -> None:
    label = np.array([0] * 50 + [1] * 10 + [2] * 3 + [3], np.int32)
    fold = fold_of(label, 5, seed=0)
    assert np.bincount(fold[:50]).tolist() == [10] * 5
    assert np.bincount(fold[50:60]).tolist() == [2] * 5
    assert len(set(fold[60:63].tolist())) == 3
    assert fold[63] == ALWAYS_TRAINED
    assert not np.array_equal(fold, fold_of(label, 5, seed=1))


def when_labels_are_read(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, do: Callable[[], object]
) -> None:
    """Have something happen between two readings of an output's rows."""
    read = getattr(module, name)

    def interrupted(*given: Any) -> Any:
        found = read(*given)
        monkeypatch.setattr(module, name, read)
        do()
        return found

    monkeypatch.setattr(module, name, interrupted)


def test_what_a_run_commits_meanwhile_shifts_no_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, path, _ = flipped(tmp_path, 600, 0.02)
    noise = np.random.default_rng(0).normal(size=(75, DIM)).astype(np.float32)
    config = LabelConfig(method="probe", labels=str(path))
    undisturbed = make_labels(output, config)

    when_labels_are_read(monkeypatch, methods, "read_labels", lambda: commit_vectors(output, "0", noise))
    made = make_labels(output, config)
    assert made["images"] == 600
    assert made["cross_validation"] == undisturbed["cross_validation"]

    when_labels_are_read(monkeypatch, suspects, "read_classes", lambda: commit_vectors(output, "00", noise))
    assert find_suspects(output, config)["labelled"] == 600
    given = dict(csv.reader(path.open()))
    assert all(row["given"] == given[row["image_id"]] for row in suspects_of(output).to_pylist())


def test_a_shard_that_a_run_replaces_meanwhile_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, path, _ = flipped(tmp_path, 600, 0.02)
    config = LabelConfig(method="probe", labels=str(path))
    last = max(CommitLog(output).live)
    when_labels_are_read(monkeypatch, methods, "read_labels", lambda: remove_commits(output, [last]))
    with pytest.raises(BusyError, match=r"a run has replaced or removed a shard meanwhile .* again"):
        make_labels(output, config)
    assert not output.find("labels")


def test_rows_are_drawn_from_every_class(tmp_path: Path) -> None:
    output = empty_output(tmp_path / "out", CLASSES)
    vectors, _ = clusters(1000)
    commit_vectors(output, "a", vectors)
    label = np.array([0] * 900 + [1] * 95 + [2] * 3 + [-1] * 2, np.int32)
    config = LabelConfig(most_labelled=120)
    rows, found = chosen_rows(CommitLog(output), label, ("embedding",), vectors_of, config)
    assert len(rows) == 120
    assert (label[rows] == 2).sum() == 3
    assert (label[rows] == 1).sum() >= 40
    assert (label[rows] == -1).sum() == 0
    np.testing.assert_array_equal(found, vectors[rows])


def suggestions_of(output: Storage) -> list[dict[str, str]]:
    version = output.read_bytes("labels/suggestions/CURRENT").decode()
    with Path(output.path(f"labels/suggestions/{version}/suggestions.csv")).open(newline="") as file:
        return list(csv.DictReader(file))


def test_suggestions_are_uncertain_and_unlike_each_other(tmp_path: Path) -> None:
    """Among many copies of the most uncertain image only few are taken."""
    rng = np.random.default_rng(0)
    vectors, kinds = clusters(600)
    centres = np.random.default_rng(99).normal(size=(len(CLASSES), DIM))
    copies = np.tile((centres[0] + centres[1]) / 2, (200, 1)) + rng.normal(scale=1e-3, size=(200, DIM))
    output = empty_output(tmp_path / "out", CLASSES)
    commit_vectors(output, "a", vectors)
    commit_vectors(output, "copies", copies.astype(np.float32))
    known = [CLASSES[kind] if n < 300 else None for n, kind in enumerate(kinds)]
    write_labels(tmp_path / "labels.csv", [f"a#{n}" for n in range(600)], known)
    config = LabelConfig(method="probe", labels=str(tmp_path / "labels.csv"))

    summary = suggest(output, config, 30)

    rows = suggestions_of(output)
    names = [row["image_id"] for row in rows]
    assert summary["suggestions"] == len(set(names)) == 30
    assert [int(row["rank"]) for row in rows] == list(range(1, 31))
    assert not {f"a#{n}" for n in range(300)} & set(names), "these have a label"
    assert sum(name.startswith("copies") for name in names) <= 10
    margins = [float(row["margin"]) for row in rows]
    assert margins == sorted(margins)
    make_labels(output, config)
    version = output.read_bytes("labels/CURRENT").decode()
    labels = pq.read_table(output.path(f"labels/{version}/labels.parquet")).to_pylist()
    told = {row["image_id"]: row for row in labels}
    for row in rows:
        assert float(row["margin"]) == pytest.approx(told[row["image_id"]]["margin"], abs=1e-5)
        assert row["likely"] == told[row["image_id"]]["label"]
    labelled = {f"a#{n}" for n in range(300)}
    unlabelled = sorted(row["margin"] for row in labels if row["image_id"] not in labelled)
    assert max(margins) <= unlabelled[min(299, len(unlabelled) - 1)] + 1e-6, "of the 300 least certain"


def test_fewer_images_than_are_asked_for_are_all_suggested(tmp_path: Path) -> None:
    made = make(tmp_path / "out", count=40, unlabelled=6)
    summary = suggest(made.output, LabelConfig(method="neighbours", labels="kind", k=5), 50)
    assert summary["suggestions"] == 6
    half = len(made.labels) // 2
    ids = [f"a#{n}" if n < half else f"b#{n - half}" for n in range(len(made.labels))]
    wanted = {name for name, label in zip(ids, made.labels, strict=True) if label is None}
    assert {row["image_id"] for row in suggestions_of(made.output)} == wanted


def test_what_cannot_be_advised_is_said(tmp_path: Path) -> None:
    made = make(tmp_path / "out", count=40, unlabelled=0)
    with pytest.raises(InputError, match="no image without a label"):
        suggest(made.output, LabelConfig(labels="kind"), 5)
    with pytest.raises(ConfigError, match="this needs images whose label is known"):
        find_suspects(made.output, LabelConfig())
    with pytest.raises(ConfigError, match="among the output's own labels alone"):
        find_suspects(made.output, LabelConfig(labels="kind", reference=made.output.uri))
    assert not made.output.find("labels")


def test_advice_keeps_labels_and_labels_keep_advice(tmp_path: Path) -> None:
    made = make(tmp_path / "out", count=60)
    for _ in range(5):
        make_labels(made.output, LabelConfig())
        find_suspects(made.output, LabelConfig(labels="kind"))
        suggest(made.output, LabelConfig(labels="kind"), 3)
    names = {info.path.split("/")[1] for info in made.output.find("labels")}
    assert {"suspects", "suggestions", "CURRENT"} <= names
    assert len(names) == 3 + 3
    assert len(suspects_of(made.output)) == 50
    assert len(suggestions_of(made.output)) == 3


@pytest.mark.slow
def test_the_command_shows_the_images(
    tiny_model: Path, write_images: WriteImages, tmp_path: Path, ray_session: None
) -> None:
    names = write_images(tmp_path / "in", 12)
    run(make_config(tmp_path / "in", tiny_model, tmp_path / "out"))
    labels = ["<b>one</b>", "two"] * 6
    write_labels(tmp_path / "labels.csv", names[:10], labels[:10])
    words = ("label", tmp_path / "out", "--labels", tmp_path / "labels.csv", "--json")

    done = cli(*words, "--suspects")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert f"{summary['flagged']} of 10 labels are probably wrong" in done.stderr
    page = (tmp_path / "out/labels/suspects" / summary["version"] / "suspects.html").read_text()
    assert page.count("data:image/jpeg") == 10
    assert "&lt;b&gt;one&lt;/b&gt;" in page
    assert "<b>one</b>" not in page

    done = cli(*words, "--from", "probe", "--suggest", 2)
    assert done.returncode == 0, done.stderr
    assert "2 images to label next" in done.stderr
    version = json.loads(done.stdout)["version"]
    page = (tmp_path / "out/labels/suggestions" / version / "suggestions.html").read_text()
    assert page.count("data:image/jpeg") == 2
    assert {row["image_id"] for row in suggestions_of(Storage(str(tmp_path / "out")))} == set(names[10:])


def test_what_was_reviewed_is_not_suggested(tmp_path: Path) -> None:
    vectors, kinds = clusters(60)
    output = empty_output(tmp_path / "out", CLASSES)
    commit_vectors(output, "a", vectors)
    write_labels(tmp_path / "labels.csv", [f"a#{n}" for n in range(30)], [CLASSES[k] for k in kinds[:30]])
    config = LabelConfig(method="probe", labels=str(tmp_path / "labels.csv"))
    record(output, [Decision(f"a#{n}", "accept", CLASSES[0]) for n in range(30, 45)])
    record(output, [Decision("a#30", "undo", None)])

    suggest(output, config, 100)

    names = {row["image_id"] for row in suggestions_of(output)}
    assert names == {"a#30", *(f"a#{n}" for n in range(45, 60))}


def test_two_questions_at_once_are_refused(tmp_path: Path) -> None:
    done = cli("label", tmp_path, "--suggest", "5", "--suspects")
    assert done.returncode == 2
    assert "one question at a time" in done.stderr
