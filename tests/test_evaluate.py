"""`evaluate` against brute force: every figure recomputed from the rows."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from pipeline.errors import FingerprintError, InputError
from pipeline.evaluate import Reference, evaluate
from pipeline.fingerprint import require_fingerprint
from pipeline.index.build import build_index
from pipeline.index.engine import Engine
from pipeline.label_source import open_labels
from pipeline.quality import calibration
from pipeline.storage import Storage
from tests.running import cli
from tests.vector_output import commit_vectors, empty_output

CLASSES = ("ant", "bee", "cow", "dog", "eel", "fox")
DIM = 16


class Made(NamedTuple):
    """An output and all that went into it; `labels` is None where an image has none."""

    output: Storage
    vectors: np.ndarray
    labels: list[str | None]
    logits: np.ndarray


def make(folder, count=240, seed=0, *, unlabelled=10) -> Made:
    """Noisy clusters, a classifier that errs, two shards, a metadata column with the labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(len(CLASSES), DIM))
    kinds = rng.integers(len(CLASSES), size=count)
    vectors = (centres[kinds] + rng.normal(scale=1.1, size=(count, DIM))).astype(np.float32)
    logits = (4 * np.eye(len(CLASSES))[kinds] + rng.normal(scale=2, size=(count, len(CLASSES)))).astype(
        np.float32
    )
    labels: list[str | None] = [CLASSES[kind] for kind in kinds]
    for place in rng.choice(count, unlabelled, replace=False):
        labels[place] = None
    output = empty_output(folder, CLASSES, metadata=["kind"])
    half = count // 2
    for name, part in (("a", slice(0, half)), ("b", slice(half, count))):
        said, scores = logits[part].argmax(1), softmax(logits[part]).max(1)
        flat = pa.array(logits[part].ravel())
        columns = {
            "kind": pa.array(labels[part], pa.string()),
            "label": [CLASSES[n] for n in said],
            "label_id": pa.array(said, pa.int32()),
            "score": pa.array(scores, pa.float32()),
            "logits": pa.FixedSizeListArray.from_arrays(flat, len(CLASSES)),
        }
        commit_vectors(output, name, vectors[part], columns=columns)
    build_index(output)
    return Made(output, vectors, labels, logits)


def random_output(folder, kinds, seed=0) -> Made:
    """Vectors that say nothing of these labels, of a model without a classifier."""
    vectors = np.random.default_rng(seed).normal(size=(len(kinds), DIM)).astype(np.float32)
    output = empty_output(folder, metadata=["kind"])
    commit_vectors(output, "a", vectors, columns={"kind": pa.array(kinds, pa.string())})
    build_index(output)
    return Made(output, vectors, kinds, np.empty(0))


def reference_of(made) -> Reference:
    return Reference(made.output, open_labels("kind", require_fingerprint(made.output), made.output))


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("evaluate") / "out")


def judged(made, labels="kind", reference=None, **options):
    known = open_labels(labels, require_fingerprint(made.output), made.output)
    return evaluate(made.output, known, reference, **options)


def page_of(values):
    return Path(values["report"].removeprefix("file://")).read_text()


def brute_force(queries, query_labels, others, other_labels, k, *, own):
    """kNN accuracy, recall@k, and mAP@100 by the definitions, among labelled images.

    `own`: the others are the first of the queries.
    """
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    cosines = unit(queries) @ unit(others).T
    right, recall, precision = [], {1: [], 5: [], 10: []}, []
    for row, label in enumerate(query_labels):
        if label is None:
            continue
        ranked = (n for n in np.argsort(-cosines[row], kind="stable") if other_labels[n] is not None)
        order = [n for n in ranked if not (own and n == row)][:100]
        votes: dict[str, float] = {}
        for n in order[:k]:
            votes[other_labels[n]] = votes.get(other_labels[n], 0) + np.exp(cosines[row, n] / 0.07)
        right.append(max(votes, key=lambda name: votes[name]) == label)
        hits = np.array([other_labels[n] == label for n in order])
        for most, found in recall.items():
            found.append(hits[:most].any())
        there = sum(it == label for it in other_labels) - (own and row < len(others))
        ranks = np.flatnonzero(hits) + 1
        precision.append(sum((n + 1) / rank for n, rank in enumerate(ranks)) / min(100, max(1, there)))
    return np.mean(right), {k: np.mean(found) for k, found in recall.items()}, np.mean(precision)


def test_the_classifier_s_figures_are_those_of_its_logits(made):
    values = judged(made)
    known = [n for n, label in enumerate(made.labels) if label is not None]
    truth = np.array([CLASSES.index(made.labels[n]) for n in known])
    logits = made.logits[known]
    assert (values["images"], values["labelled"]) == (240, 230)
    assert values["top1"] == pytest.approx((logits.argmax(1) == truth).mean())
    top5 = (np.argsort(-logits, axis=1)[:, :5] == truth[:, None]).any(1)
    assert values["top5"] == pytest.approx(top5.mean())
    expected = calibration(softmax(logits).max(1).astype(np.float32), logits.argmax(1) == truth)
    assert values["calibration_error"] == pytest.approx(expected.error, abs=1e-6)
    assert sum(map(sum, values["confusion"])) == 230
    assert not any(values["said_otherwise"])
    assert "another class" not in page_of(values)
    assert [row["class"] for row in values["per_class"]] == list(CLASSES)


def test_what_is_said_beside_the_labelled_classes_is_a_column_of_the_confusion(tmp_path):
    names = [f"c{number}" for number in range(20)]
    said = np.array([0] * 5 + [7] * 15 + [9] * 20)
    columns = {
        "kind": ["c0"] * 20 + ["c1"] * 20,
        "label_id": pa.array(said, pa.int32()),
        "score": pa.array([0.9] * 40, pa.float32()),
    }
    output = empty_output(tmp_path / "out", names, metadata=["kind"])
    vectors = np.random.default_rng(0).normal(size=(40, DIM)).astype(np.float32)
    commit_vectors(output, "a", vectors, columns=columns)
    build_index(output)
    values = judged(Made(output, vectors, columns["kind"], np.empty(0)))
    assert values["confusion"] == [[5, 0], [0, 0]]
    assert values["said_otherwise"] == [15, 20]
    page = page_of(values)
    for told in (
        "c0 said to be c0: 25.0%",
        "c0 said to be another class: 75.0%",
        "c1 said to be another class: 100.0%",
    ):
        assert told in page


@pytest.mark.parametrize(("kept", "known"), [(0, False), (3, False), (5, True)])
def test_top5_is_known_where_five_candidates_were_kept(made, tmp_path, kept, known):
    said = np.argsort(-made.logits, axis=1, kind="stable")
    columns = {
        "kind": pa.array(made.labels, pa.string()),
        "label_id": pa.array(said[:, 0], pa.int32()),
        "score": pa.array(softmax(made.logits).max(1)),
    }
    if kept:
        best = pa.array(said[:, :kept].ravel(), pa.int32())
        columns["top_ids"] = pa.FixedSizeListArray.from_arrays(best, kept)
    output = empty_output(tmp_path / "out", CLASSES, metadata=["kind"])
    commit_vectors(output, "a", made.vectors, columns=columns)
    build_index(output)
    mine, whole = judged(made._replace(output=output)), judged(made)
    assert mine["top1"] == pytest.approx(whole["top1"])
    assert mine["top5"] == (pytest.approx(whole["top5"]) if known else None)
    assert ("the output keeps fewer candidates" in page_of(mine)) is not known
    if not kept:
        done = cli("evaluate", output.uri, "--labels", "kind")
        assert f"top-1 {mine['top1']:.2%}; calibration error" in done.stderr


def test_neighbours_of_the_output_itself_leave_the_image_out(made):
    values = judged(made, k=7)
    accuracy, recall, precision = brute_force(
        made.vectors, made.labels, made.vectors, made.labels, 7, own=True
    )
    assert values["knn_accuracy"] == pytest.approx(accuracy)
    assert values["map_at_100"] == pytest.approx(precision, abs=1e-5)
    assert [values[f"recall_at_{k}"] for k in (1, 5, 10)] == pytest.approx([recall[k] for k in (1, 5, 10)])


def test_neighbours_of_another_output_are_looked_for_there(made, tmp_path):
    other = make(tmp_path / "reference", 300, seed=5)
    values = judged(made, reference=reference_of(other))
    accuracy, recall, precision = brute_force(
        made.vectors, made.labels, other.vectors, other.labels, 20, own=False
    )
    assert values["knn_accuracy"] == pytest.approx(accuracy)
    assert values["recall_at_1"] == pytest.approx(recall[1])
    assert values["map_at_100"] == pytest.approx(precision, abs=1e-5)
    assert values["reference"].endswith("reference")


def test_classes_that_only_the_reference_has_vote_too(tmp_path):
    made = random_output(tmp_path / "out", ["ant"] * 60, seed=1)
    other = random_output(tmp_path / "reference", ["ant"] * 30 + ["bee"] * 270, seed=2)
    values = judged(made, reference=reference_of(other))
    accuracy, *_ = brute_force(made.vectors, made.labels, other.vectors, other.labels, 20, own=False)
    assert values["knn_accuracy"] == pytest.approx(accuracy)
    assert values["knn_accuracy"] < 0.2
    assert values["classes"] == ["ant"]


def test_an_output_named_as_its_own_reference_leaves_the_image_out_too(tmp_path):
    made = random_output(tmp_path / "out", list("ABC") * 20)
    known = reference_of(made).labels
    values = judged(made)
    named = judged(made, reference=Reference(Storage(f"{tmp_path}/out/"), known))
    assert values["knn_accuracy"] < 0.6
    for name in ("reference", "knn_accuracy", "recall_at_1", "map_at_100"):
        assert named[name] == values[name]


def test_images_without_a_label_are_nobody_s_neighbours(tmp_path):
    made = make(tmp_path / "out", 400, unlabelled=350)
    values = judged(made)
    known = [n for n, label in enumerate(made.labels) if label is not None]
    labels = [made.labels[n] for n in known]
    accuracy, recall, precision = brute_force(
        made.vectors[known], labels, made.vectors[known], labels, 20, own=True
    )
    assert values["knn_accuracy"] == pytest.approx(accuracy)
    assert [values[f"recall_at_{k}"] for k in (1, 5, 10)] == pytest.approx([recall[k] for k in (1, 5, 10)])
    assert values["map_at_100"] == pytest.approx(precision, abs=1e-5)


def test_where_all_are_labelled_the_index_is_searched_without_a_filter(tmp_path, monkeypatch):
    filters = []
    search = Engine.search
    made = [make(tmp_path / str(unlabelled), 60, unlabelled=unlabelled) for unlabelled in (0, 1)]
    monkeypatch.setattr(
        Engine, "search", lambda *args, only: filters.append(only) or search(*args, only=only)
    )
    judged(made[0])
    assert filters.pop() is None
    judged(made[1])
    assert filters.pop().sum() == 59


def test_many_classes_need_no_room_for_a_vote_of_each(tmp_path):
    made = random_output(tmp_path / "out", [f"person {n % 4000}" for n in range(4000)])
    tracemalloc.start()
    try:
        judged(made, most_queries=2000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2000 * 4000 * 4  # half of a vote of each, in float64


def test_what_the_index_lacks_is_nobody_s_neighbour_and_told(tmp_path, caplog):
    made = random_output(tmp_path / "out", list("ABC") * 6)
    more = made.vectors + np.random.default_rng(1).normal(scale=0.1, size=made.vectors.shape)
    commit_vectors(made.output, "b", more.astype(np.float32), columns={"kind": made.labels})
    values = judged(made, k=5)
    accuracy, recall, precision = brute_force(
        np.concatenate([made.vectors, more]), made.labels * 2, made.vectors, made.labels, 5, own=True
    )
    assert (values["labelled"], values["not_indexed"]) == (36, 18)
    assert "18 labelled images are not in the index" in caplog.text
    assert "18 labelled images; run cvt-pipeline index" in page_of(values)
    assert values["knn_accuracy"] == pytest.approx(accuracy)
    assert values["recall_at_1"] == pytest.approx(recall[1])
    assert values["map_at_100"] == pytest.approx(precision, abs=1e-5)
    build_index(made.output)
    assert judged(made)["not_indexed"] == 0


def test_an_index_without_a_labelled_image_is_refused(tmp_path):
    made = random_output(tmp_path / "out", [None] * 20)
    commit_vectors(made.output, "b", made.vectors, columns={"kind": ["ant"] * 20})
    with pytest.raises(
        InputError, match=r"no image in the index of .* has a label there; .* run: cvt-pipeline"
    ):
        judged(made)


def test_a_class_s_figures_average_to_the_whole(made):
    values = judged(made)
    rows = values["per_class"]
    weights = [row["images"] for row in rows]
    for name in ("knn_accuracy", "map_at_100"):
        assert np.average([row[name] for row in rows], weights=weights) == pytest.approx(
            values[name], abs=1e-5
        )
    assert np.average([row["recall"] for row in rows], weights=weights) == pytest.approx(values["top1"])


def test_a_class_that_was_not_asked_for_neighbours_has_no_figures_of_them(made):
    values = judged(made, most_queries=2)
    known = [row for row in values["per_class"] if row["map_at_100"] is not None]
    assert 1 <= len(known) <= 2
    for name in ("knn_accuracy", "map_at_100"):
        assert [row for row in values["per_class"] if row[name] is not None] == known
    assert "–" in page_of(values)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_labels_of_a_file_are_joined_by_id(made, tmp_path, suffix):
    ids = [f"{'a' if n < 120 else 'b'}#{n % 120}" for n in range(240)]
    rows = [(image_id, label) for image_id, label in zip(ids, made.labels, strict=True) if label]
    rows.reverse()
    table = pa.table(
        {"image_id": [r[0] for r in rows], "label": [r[1] for r in rows], "note": [1] * len(rows)}
    )
    path = tmp_path / f"labels.{suffix}"
    if suffix == "csv":
        pa_csv.write_csv(table, path)
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    mine, theirs = judged(made, str(path)), judged(made)
    for name in ("labelled", "top1", "knn_accuracy", "map_at_100", "per_class"):
        assert mine[name] == theirs[name]


def test_labels_may_be_the_classifier_s_ids_which_is_told(made, tmp_path):
    ids = [f"{'a' if n < 120 else 'b'}#{n % 120}" for n in range(240)]
    lines = [
        f"{image_id},{CLASSES.index(label)}\n"
        for image_id, label in zip(ids, made.labels, strict=True)
        if label
    ]
    (tmp_path / "labels.csv").write_text("image_id,label\n" + "".join(lines))
    by_name, by_id = judged(made), judged(made, str(tmp_path / "labels.csv"))
    assert by_id["top1"] == by_name["top1"]
    assert by_name["labels_are_ids_of"] is None
    assert by_id["labels_are_ids_of"] == {str(number): name for number, name in enumerate(CLASSES)}
    told = "numbers, taken as the classifier&#x27;s ids: 0 = ant, 1 = bee, 2 = cow"
    assert told in page_of(by_id)
    assert told not in page_of(by_name)
    done = cli("evaluate", made.output.uri, "--labels", str(tmp_path / "labels.csv"))
    assert "labels are numbers, taken as the classifier's ids: 0 = ant, 1 = bee" in done.stderr


def test_labels_that_the_classifier_does_not_know_judge_the_neighbours_alone(tmp_path):
    made = make(tmp_path / "out", 60)
    (tmp_path / "labels.csv").write_text(
        "image_id,label\n" + "".join(f"a#{n},{'odd' if n % 2 else 'even'}\n" for n in range(30))
    )
    values = judged(made, str(tmp_path / "labels.csv"))
    assert values["top1"] is None
    assert values["classes"] == ["even", "odd"]
    assert values["labelled"] == 30


def test_a_seeded_choice_of_queries_is_asked_of_large_outputs(made):
    values = judged(made, most_queries=50)
    assert values["queries"] == 50
    assert values["labelled"] == 230
    assert abs(values["knn_accuracy"] - judged(made)["knn_accuracy"]) < 0.2


def test_folders_are_labels(tmp_path):
    output = empty_output(tmp_path / "out")
    rng = np.random.default_rng(0)
    ids = [f"{name}/{n}.jpg" for name in ("cat", "dog") for n in range(20)]
    vectors = rng.normal(size=(40, DIM)).astype(np.float32)
    vectors[:20, 0] += 9
    commit_vectors(output, "images", vectors, image_ids=ids, columns={"key": ids})
    members = [f"a.tar#{path}" for path in ids]
    commit_vectors(output, "a.tar", vectors, image_ids=members, columns={"key": ids})
    build_index(output)
    values = evaluate(output, open_labels("folder", require_fingerprint(output), output), None, k=5)
    assert values["classes"] == ["cat", "dog"]
    assert values["labelled"] == 80
    assert values["knn_accuracy"] > 0.8


@pytest.mark.parametrize("place", ["s3://bucket/cat/1.jpg", "/data/cat/1.jpg", "../cat/1.jpg"])
def test_a_manifest_s_uris_have_no_folder_that_is_a_label(tmp_path, place):
    output = empty_output(tmp_path / "out")
    vectors = np.ones((1, DIM), np.float32)
    commit_vectors(output, "images", vectors, image_ids=[place], columns={"key": [place]})
    build_index(output)
    with pytest.raises(InputError, match=f"--labels folder: {place} is no path below the input"):
        evaluate(output, open_labels("folder", require_fingerprint(output), output), None)


def test_what_cannot_be_labels_is_refused_with_what_can(made, tmp_path):
    with pytest.raises(InputError, match=r"no column species \(its metadata columns: kind\); give a \.csv"):
        judged(made, "species")
    (tmp_path / "x.csv").write_text("id,label\n1,2\n")
    with pytest.raises(InputError, match=r"has no column image_id; it has id, label"):
        judged(made, str(tmp_path / "x.csv"))
    with pytest.raises(InputError, match="cannot read"):
        judged(made, str(tmp_path / "nothing.csv"))
    (tmp_path / "others.csv").write_text("image_id,label\nnobody,ant\n")
    with pytest.raises(InputError, match="none of the 240 images"):
        judged(made, str(tmp_path / "others.csv"))


def labelled_by(made, path, table, **options):
    """The evaluation by a Parquet file of labels."""
    pq.write_table(table, path)
    return judged(made, str(path), **options)


def test_a_file_that_labels_an_image_twice_is_refused_unless_both_agree(made, tmp_path):
    ids, labels = ["a#0", "a#1", "a#0"], ["ant", "bee", "ant"]
    values = labelled_by(made, tmp_path / "twice.parquet", pa.table({"image_id": ids, "label": labels}))
    assert values["labelled"] == 2
    unclear = pa.table({"image_id": ids, "label": ["ant", "bee", None]})
    assert labelled_by(made, tmp_path / "null.parquet", unclear)["labelled"] == 2
    two = pa.table({"image_id": ids, "label": ["ant", "bee", "cow"]})
    with pytest.raises(InputError, match=r"two\.parquet has two labels of a#0, ant and cow; leave one"):
        labelled_by(made, tmp_path / "two.parquet", two)


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("list", [["ant"], ["bee"]]), ("struct", [{"name": "ant"}, None]), ("binary", [b"\xff\xfe", b"ant"])],
)
def test_a_column_that_is_no_text_is_refused_by_its_name_and_type(made, tmp_path, kind, labels):
    table = pa.table({"image_id": ["a#0", "a#1"], "label": labels})
    with pytest.raises(InputError, match=rf"x\.parquet, column label holds {kind}"):
        labelled_by(made, tmp_path / "x.parquet", table)


def test_two_columns_of_labels_are_refused(made, tmp_path):
    (tmp_path / "x.csv").write_text("image_id,label,label\na#0,ant,bee\n")
    with pytest.raises(InputError, match=r"x\.csv has several columns label; keep one of each"):
        judged(made, str(tmp_path / "x.csv"))


def test_class_numbers_whose_names_a_file_tells_are_names(made, tmp_path):
    """Numbers of an order that is not the classifier's, as datasets and our own exports write them."""
    names = sorted(CLASSES, reverse=True)
    numbers = [-1 if label is None else names.index(label) for label in made.labels]
    ids = [f"{'a' if n < 120 else 'b'}#{n % 120}" for n in range(240)]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image_id": ids, "label": numbers}).replace_schema_metadata(told)
    values, by_name = labelled_by(made, tmp_path / "labels.parquet", table), judged(made)
    for name in ("labelled", "classes", "labels_are_ids_of", "top1", "knn_accuracy"):
        assert values[name] == by_name[name]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["2020-05-05", "2021-05-05 10:00:00"], None), ([3, 0], ["0", "3"]), (["2020-05-05", "fox"], None)],
)
def test_json_lines_are_not_read_as_times(tmp_path, labels, classes):
    output = empty_output(tmp_path / "out")
    ids = ["2020-01-01", "2020-01-02"]
    commit_vectors(output, "a", np.eye(2, DIM, dtype=np.float32), image_ids=ids)
    build_index(output)
    rows = [{"image_id": it, "label": label} for it, label in zip(ids, labels, strict=True)]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = evaluate(output, open_labels(str(path), require_fingerprint(output), output), None)
    assert values["classes"] == (classes or sorted(labels))
    assert values["labelled"] == 2


def test_a_number_that_is_missing_is_no_label(made, tmp_path):
    table = pa.table({"image_id": ["a#0", "a#1", "a#2"], "label": [0.0, float("nan"), 2.0]})
    values = labelled_by(made, tmp_path / "x.parquet", table)
    assert (values["labelled"], values["classes"]) == (2, ["0", "2"])


def test_another_model_s_output_is_no_reference(made, tmp_path):
    other = make(tmp_path / "other", 60)
    path = tmp_path / "other" / "fingerprint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_sha256": "1"}))
    with pytest.raises(FingerprintError, match="another weights_sha256"):
        judged(made, reference=reference_of(other))


def test_the_command_prints_values_and_writes_a_page(made):
    done = cli("evaluate", made.output.uri, "--labels", "kind", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert f"{values['top1']:.2%}" in done.stderr
    assert all(name in page_of(values) for name in CLASSES)
    assert cli("evaluate", made.output.uri, "--labels", "nothing").returncode == 2
