"""Decisions of people: kept whatever dies, undone, and taken into account by `label`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.config import LabelConfig
from pipeline.errors import InputError, OutputError
from pipeline.labels.make import make_labels
from pipeline.labels.reviews import FOLDER, Decision, hold, read_decisions, record, standing
from pipeline.serve.review_book import ReviewBook
from pipeline.storage import Storage
from tests.test_evaluate import CLASSES, Made, make
from tests.test_labels import COARSER, labelled, table_of

ROOT = Path(__file__).parent.parent


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def test_the_last_decision_that_was_not_undone_stands(output: Storage) -> None:
    one = Decision("a", "accept", "cat", "cat", "ann", "2026-01-01T00:00:00Z")
    two = Decision("a", "relabel", "dog", "cat")
    record(output, [one, Decision("b", "reject", None, "cat")])
    record(output, [two])
    assert standing(output)["a"] == two
    record(output, [Decision("a", "undo", None)])
    assert standing(output) == {"a": one, "b": Decision("b", "reject", None, "cat")}
    record(output, [Decision("a", "undo", None), Decision("a", "undo", None), Decision("c", "undo", None)])
    assert set(standing(output)) == {"b"}
    assert len(list(read_decisions(output))) == 7
    assert standing(Storage(output.uri + "-none")) == {}


def test_an_undo_takes_back_what_it_names_whatever_was_said_since_and_whatever_clocks_say(
    output: Storage,
) -> None:
    ann, bob = Decision("a", "accept", "cat"), Decision("a", "relabel", "dog")
    undo = Decision("a", "undo", None, undoes=ann.id)
    for order in ([ann, bob, undo], [undo, ann, bob]):
        assert hold(order) == {"a": bob}
    assert hold([undo, ann]) == hold([ann, undo]) == {}

    ahead = f"{FOLDER}/29990101T000000.999999Z-000000.json"
    output.write_bytes(ahead, json.dumps([asdict(ann)]).encode())
    later = record(output, [bob], after=ahead)
    assert later.startswith(f"{FOLDER}/29990101T000001.000000Z-")
    assert standing(output) == {"a": bob}
    assert record(output, [bob], after=f"{FOLDER}/named by hand.json") < later


def test_two_books_agree_and_an_undo_of_another_s_is_refused_once_it_is_done(output: Storage) -> None:
    mine, theirs = ReviewBook(output), ReviewBook(output)
    accept = Decision("a", "accept", "cat")
    mine.say([accept])
    theirs.refresh()
    change = Decision("a", "relabel", "dog")
    theirs.say([change])
    mine.refresh()
    mine.say([Decision("a", "undo", None, undoes=accept.id)])
    theirs.refresh()
    assert mine.of("a") == theirs.of("a") == standing(output)["a"] == change
    with pytest.raises(InputError, match="no such decision on a to undo"):
        theirs.say([Decision("a", "undo", None, undoes=accept.id)])
    theirs.say([Decision("a", "undo", None, undoes=change.id)])
    assert theirs.held() == {}


def test_records_of_an_earlier_version_are_read(output: Storage) -> None:
    older = [{k: v for k, v in asdict(Decision("a", "accept", "cat")).items() if k not in ("id", "undoes")}]
    output.write_bytes(f"{FOLDER}/20260101T000000.000000Z-x.json", json.dumps(older).encode())
    assert standing(output)["a"].label == "cat"
    record(output, [Decision("a", "undo", None)])
    assert standing(output) == {}


@pytest.mark.parametrize(("action", "label"), [("accept", None), ("reject", "cat"), ("praise", "cat")])
def test_a_decision_without_sense_is_none(action: str, label: str | None) -> None:
    with pytest.raises(ValueError, match="found"):
        Decision("a", action, label)  # type: ignore[arg-type]


def test_what_is_no_record_of_reviews_is_named(output: Storage) -> None:
    for junk in (b"{", b"[{}]", b'[{"image_id": "a", "action": "hum", "label": "x"}]', b"[1]"):
        output.write_bytes(f"{FOLDER}/20260101T000000Z-x.json", junk)
        with pytest.raises(OutputError, match=r"20260101T000000Z-x\.json: not a record of reviews"):
            standing(output)


SAYER = """
import sys
from pipeline.labels.reviews import Decision, record
from pipeline.storage import Storage
number = 0
while True:
    record(Storage(sys.argv[1]), [Decision(f"image {number}", "accept", "cat")])
    print(number, flush=True)
    number += 1
"""


def test_a_killed_server_loses_no_decision_that_it_has_confirmed(output: Storage) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SAYER, output.uri], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        confirmed = [int(process.stdout.readline()) for _ in range(40)]
        os.kill(process.pid, signal.SIGKILL)
        confirmed += [int(line) for line in process.stdout.read().splitlines()]
    found = set(standing(output))
    assert {f"image {number}" for number in confirmed} <= found
    assert len(found) <= len(confirmed) + 1


def test_labels_follow_what_people_decided(tmp_path: Path) -> None:
    made: Made = make(tmp_path / "out")
    before, _ = labelled(made)
    wrong = next(name for name in CLASSES if name != before[1]["label"])
    record(made.output, [Decision("a#0", "accept", before[0]["label"], before[0]["label"])])
    record(made.output, [Decision("a#1", "relabel", wrong, before[1]["label"])])
    record(made.output, [Decision("a#2", "reject", None, before[2]["label"])])
    record(made.output, [Decision("a#3", "relabel", "a new class", before[3]["label"])])
    record(made.output, [Decision("a#4", "reject", None), Decision("a#4", "undo", None)])
    record(made.output, [Decision("not here", "reject", None)])

    rows, summary = labelled(made, threshold=0.5, labels="kind", keep_known=True)

    told = [(row["label"], row["label_id"], row["score"], row["method"]) for row in rows[:4]]
    assert told == [
        (before[0]["label"], before[0]["label_id"], 1.0, "review"),
        (wrong, CLASSES.index(wrong), 1.0, "review"),
        ("unknown", -1, 0.0, "review"),
        ("a new class", len(CLASSES), 1.0, "review"),
    ]
    assert rows[4]["method"] in ("given", "head")
    assert "review" not in {row["method"] for row in rows[4:]}
    assert summary["labels"]["a new class"] == 1
    assert list(summary["label_names"]) == [*CLASSES, "a new class"]
    make_labels(made.output, LabelConfig())
    assert sum(method == "review" for method in table_of(made.output).column("method").to_pylist()) == 4
    assert len(made.output.find(FOLDER)) == 6, "versions come and go, reviews stay"


def test_decisions_on_classes_are_those_of_their_coarser_labels(tmp_path: Path) -> None:
    made: Made = make(tmp_path / "out")
    record(made.output, [Decision("a#0", "relabel", "bee"), Decision("a#1", "relabel", "insect")])
    record(made.output, [Decision("a#2", "accept", "unknown")])  # of an earlier version of the page
    rows, summary = labelled(made, coarser=COARSER)
    assert [row["label"] for row in rows[:3]] == ["insect", "insect", "unknown"]
    assert [row["label_id"] for row in rows[:3]] == [0, 0, -1]
    assert set(summary["label_names"]) == {"insect", "mammal", "eel"}
