"""`label` against plain NumPy over the committed rows: every method, thresholds, coarser labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression

from pipeline.config import LabelConfig
from pipeline.errors import ConfigError, FingerprintError, InputError
from pipeline.fingerprint import require_fingerprint
from pipeline.labels import make as make_module
from pipeline.labels.cross_validation import interval
from pipeline.labels.decide import Rule
from pipeline.labels.make import make_labels
from pipeline.labels.probe import SOLVER, Probe, train
from pipeline.neighbour_quality import TEMPERATURE
from pipeline.schema import LABELS
from pipeline.storage import Storage
from tests.running import cli
from tests.test_evaluate import CLASSES, Made, make, random_output, softmax
from tests.vector_output import commit_vectors, empty_output

COARSER = {"ant": "insect", "bee": "insect", "cow": "mammal", "dog": "mammal", "fox": "mammal"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("labels") / "out")


def table_of(output: Storage) -> pa.Table:
    """The rows of the version that is served."""
    version = output.read_bytes("labels/CURRENT").decode()
    table = pq.read_table(output.path(f"labels/{version}/labels.parquet"))
    assert table.schema.equals(LABELS)
    return table


def labelled(made: Made, **config: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows in the order of the made images, and the summary."""
    summary = make_labels(made.output, LabelConfig.model_validate(config))
    rows = {row["image_id"]: row for row in table_of(made.output).to_pylist()}
    half = len(made.vectors) // 2
    ids = [f"a#{n}" for n in range(half)] + [f"b#{n}" for n in range(len(made.vectors) - half)]
    assert set(rows) == set(ids)
    return [rows[name] for name in ids], summary


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def assert_of_probabilities(rows: list[dict[str, Any]], p: np.ndarray, names: Sequence[str]) -> None:
    """What the rows say is what these probabilities say, without thresholds."""
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    assert column(rows, "label") == [names[n] for n in order[:, 0]]
    assert column(rows, "label_id") == order[:, 0].tolist()
    np.testing.assert_allclose(column(rows, "score"), ranked[:, 0], atol=1e-5)
    for row, best, second, place in zip(rows, ranked[:, 0], ranked[:, 1], order[:, 1], strict=True):
        if second > 0:
            assert row["runner_up"] == names[place]
            assert row["margin"] == pytest.approx(best - second, abs=1e-5)
        else:
            assert row["runner_up"] is None
            assert row["margin"] is None


def test_the_head_s_labels_are_those_of_its_logits(made: Made) -> None:
    rows, summary = labelled(made)
    assert_of_probabilities(rows, softmax(made.logits), CLASSES)
    assert set(column(rows, "method")) == {"head"}
    assert summary["images"] == len(rows)
    assert summary["labels"] == {name: column(rows, "label").count(name) for name in summary["labels"]}
    assert summary["unknown"] == 0


def test_below_the_threshold_of_its_class_an_image_is_unknown(made: Made) -> None:
    rows, summary = labelled(made, threshold=0.6, thresholds={"dog": 0.95, "ant": 0.0})
    p = softmax(made.logits)
    least = np.array([0.6] * len(CLASSES))
    least[CLASSES.index("dog")], least[CLASSES.index("ant")] = 0.95, 0.0
    best = p.argmax(1)
    known = p.max(1) >= least[best]
    assert 20 < (~known).sum() < 200
    wanted = [CLASSES[n] if ok else "unknown" for n, ok in zip(best, known, strict=True)]
    assert column(rows, "label") == wanted
    assert column(rows, "label_id") == np.where(known, best, -1).tolist()
    assert [row["runner_up"] for row, ok in zip(rows, known, strict=True) if not ok] == [
        CLASSES[n] for n in best[~known]
    ]
    np.testing.assert_allclose(column(rows, "score"), p.max(1), atol=1e-6)
    assert summary["unknown"] == (~known).sum()


def test_coarser_labels_have_the_sums_of_their_classes(made: Made) -> None:
    rows, _ = labelled(made, coarser=COARSER, threshold=0.5, thresholds={"insect": 0.9})
    p = softmax(made.logits)
    names = ["insect", "mammal", "eel"]
    sums = np.stack([p[:, [COARSER.get(c, c) == name for c in CLASSES]].sum(1) for name in names], axis=1)
    np.testing.assert_allclose(column(rows, "score"), sums.max(1), atol=1e-5)
    assert "insect" in column(rows, "label")
    least = np.array([0.9, 0.5, 0.5])[sums.argmax(1)]
    wanted = np.where(sums.max(1) >= least, np.array(names)[sums.argmax(1)], "unknown")
    assert column(rows, "label") == wanted.tolist()


def with_logits(made: Made, folder: Path, columns: dict[str, Any]) -> Storage:
    """The same images in an output that kept less of the logits."""
    output = empty_output(folder, CLASSES)
    p = softmax(made.logits)
    said = p.argmax(1)
    usual = {
        "label": [CLASSES[n] for n in said],
        "label_id": pa.array(said, pa.int32()),
        "score": pa.array(p.max(1), pa.float32()),
    }
    commit_vectors(output, "a", made.vectors, columns={**usual, **columns})
    return output


def test_of_the_largest_logits_probabilities_are_those_of_all(made: Made, tmp_path: Path) -> None:
    top = np.argsort(-made.logits, axis=1, kind="stable")[:, :3]
    kept = np.take_along_axis(made.logits, top, axis=1)
    columns = {
        "top_ids": pa.FixedSizeListArray.from_arrays(pa.array(top.ravel(), pa.int32()), 3),
        "top_logits": pa.FixedSizeListArray.from_arrays(pa.array(kept.ravel()), 3),
    }
    output = with_logits(made, tmp_path / "out", columns)
    make_labels(output, LabelConfig())
    assert_of_probabilities(table_of(output).to_pylist(), softmax(made.logits), CLASSES)


def test_without_logits_a_label_has_its_score_and_no_runner_up(made: Made, tmp_path: Path) -> None:
    output = with_logits(made, tmp_path / "out", {})
    make_labels(output, LabelConfig(threshold=0.5))
    rows = table_of(output).to_pylist()
    p = softmax(made.logits)
    sure = p.max(1) >= 0.5
    wanted = [CLASSES[n] if ok else "unknown" for n, ok in zip(p.argmax(1), sure, strict=True)]
    assert column(rows, "label") == wanted
    np.testing.assert_allclose(column(rows, "score"), p.max(1), atol=1e-6)
    assert set(column(rows, "margin")) == {None}
    assert [row["runner_up"] is None for row in rows] == sure.tolist()


def test_known_labels_calibrate_the_head(tmp_path: Path) -> None:
    made = make(tmp_path / "made", count=2000, unlabelled=600)
    made = made._replace(logits=3 * made.logits)  # three times as sure as it should be
    flat = pa.array(made.logits.ravel())
    columns = {"logits": pa.FixedSizeListArray.from_arrays(flat, len(CLASSES))}
    output = with_logits(made, tmp_path / "out", columns)
    write_labels(tmp_path / "labels.csv", [f"a#{n}" for n in range(2000)], made.labels)

    summary = make_labels(output, LabelConfig(labels=str(tmp_path / "labels.csv")))

    found = summary["calibration"]
    assert found["rows"] == 1400
    assert found["error_after"] < 0.4 * found["error_before"]
    assert found["temperature"] == pytest.approx(3, rel=0.15)
    loss = [cross_entropy(made, found["temperature"] * factor) for factor in (0.97, 1, 1.03)]
    assert loss[1] == min(loss)
    rows = table_of(output).to_pylist()
    assert_of_probabilities(rows, softmax(made.logits / found["temperature"]), CLASSES)


def test_logits_that_are_not_finite_make_no_label_and_spoil_no_calibration(tmp_path: Path) -> None:
    made = make(tmp_path / "made", count=400, unlabelled=0)
    flawed = made.logits.copy()
    flawed[5], flawed[6, 2] = np.nan, np.inf
    flat = pa.array(flawed.ravel())
    output = with_logits(
        made, tmp_path / "out", {"logits": pa.FixedSizeListArray.from_arrays(flat, len(CLASSES))}
    )
    write_labels(tmp_path / "labels.csv", [f"a#{n}" for n in range(400)], made.labels)

    summary = make_labels(output, LabelConfig(labels=str(tmp_path / "labels.csv")))

    rows = table_of(output).to_pylist()
    for row in rows[5:7]:
        assert (row["label"], row["label_id"], row["score"], row["margin"]) == ("unknown", -1, 0.0, None)
    assert summary["calibration"]["rows"] == 398
    assert np.isfinite(column(rows, "score")).all()


def test_a_name_that_two_classes_have_calibrates_neither(tmp_path: Path) -> None:
    made = make(tmp_path / "made", count=400, unlabelled=0)
    twice = [*CLASSES[:-1], CLASSES[0]]
    output = empty_output(tmp_path / "out", twice)
    flat = pa.array(made.logits.ravel())
    columns: dict[str, object] = {"logits": pa.FixedSizeListArray.from_arrays(flat, len(CLASSES))}
    columns |= {"label_id": pa.array(made.logits.argmax(1), pa.int32())}
    commit_vectors(output, "a", made.vectors, columns=columns)
    names = [CLASSES[0] if label == CLASSES[-1] else label for label in made.labels]
    write_labels(tmp_path / "labels.csv", [f"a#{n}" for n in range(400)], names)

    summary = make_labels(output, LabelConfig(labels=str(tmp_path / "labels.csv")))

    assert summary["calibration"]["rows"] == sum(name != CLASSES[0] for name in names)


def write_labels(path: Path, ids: Sequence[str], labels: Sequence[str | None]) -> None:
    """A CSV of the images that have a label."""
    pairs = [(name, label) for name, label in zip(ids, labels, strict=True) if label is not None]
    table = pa.table({"image_id": [a for a, _ in pairs], "label": [b for _, b in pairs]})
    pa_csv.write_csv(table, path)


def cross_entropy(made: Made, temperature: float) -> float:
    p = softmax(made.logits / temperature)
    known = [(n, CLASSES.index(label)) for n, label in enumerate(made.labels) if label is not None]
    return float(np.mean([-np.log(p[row, kind]) for row, kind in known]))


def votes(made: Made, known: list[str | None], k: int, *, own: bool) -> np.ndarray:
    """Shares of the nearest labelled images' votes, by looking at every pair."""
    unit = made.vectors / np.linalg.norm(made.vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    if own:
        np.fill_diagonal(cosines, -np.inf)
    cosines[:, [label is None for label in known]] = -np.inf
    names = sorted({label for label in known if label is not None})
    shares = np.zeros((len(unit), len(names)))
    for row, near in enumerate(np.argsort(-cosines, axis=1, kind="stable")[:, :k]):
        for place in near:
            label = known[place]
            if np.isfinite(cosines[row, place]) and label is not None:
                shares[row, names.index(label)] += np.exp((cosines[row, place] - 1) / TEMPERATURE)
    return shares / shares.sum(1, keepdims=True)


def few(made: Made, folder: Path, share: float = 0.2) -> tuple[Path, list[str | None]]:
    """A CSV with the labels of some of the images, and the same as a list."""
    rng = np.random.default_rng(5)
    known = [label if rng.random() < share else None for label in made.labels]
    half = len(known) // 2
    ids = [f"a#{n}" if n < half else f"b#{n - half}" for n in range(len(known))]
    write_labels(folder / "labels.csv", ids, known)
    return folder / "labels.csv", known


def test_neighbours_vote_for_every_image_but_not_for_themselves(made: Made, tmp_path: Path) -> None:
    path, known = few(made, tmp_path)
    rows, summary = labelled(made, method="neighbours", labels=str(path), k=7)
    assert_of_probabilities(rows, votes(made, known, 7, own=True), CLASSES)
    assert summary["reference_images"] == sum(label is not None for label in known)
    right = [row["label"] == label for row, label in zip(rows, made.labels, strict=True) if label]
    assert np.mean(right) > 0.6


def test_images_that_the_index_lacks_are_voted_for_too(tmp_path: Path) -> None:
    """Where fewer images are labelled than vote, an answer ends in places that are no image."""
    made = random_output(tmp_path / "out", ["ant"] * 4)
    commit_vectors(made.output, "b", made.vectors, columns={"kind": [None] * 4})
    make_labels(made.output, LabelConfig(method="neighbours", labels="kind", k=7))
    assert table_of(made.output).column("label").to_pylist() == ["ant"] * 8


def test_an_output_that_is_its_own_reference_votes_as_without_one(made: Made, tmp_path: Path) -> None:
    path, _ = few(made, tmp_path)
    config = {"method": "neighbours", "labels": str(path), "k": 10}
    alone, _ = labelled(made, **config)
    assert labelled(made, **config, reference=f"{made.output.uri}/")[0] == alone


def test_another_output_of_the_model_can_vote(made: Made, tmp_path: Path) -> None:
    other = empty_output(tmp_path / "other", CLASSES)
    commit_vectors(other, "new", made.vectors[:50] + 0.01)
    config = {"method": "neighbours", "labels": "kind", "reference": made.output.uri, "k": 1}
    summary = make_labels(other, LabelConfig.model_validate(config))
    said = column(table_of(other).to_pylist(), "label")
    agree = [a == b for a, b in zip(said, made.labels[:50], strict=True) if b is not None]
    assert np.mean(agree) == 1
    assert summary["reference"] == made.output.uri


def test_a_probe_is_what_scikit_learn_fits(made: Made, tmp_path: Path) -> None:
    path, known = few(made, tmp_path, share=0.4)
    rows, summary = labelled(made, method="probe", labels=str(path))
    some = [n for n, label in enumerate(known) if label is not None]
    x = made.vectors[some]
    mean, scale = x.mean(0), x.std(0) + 1e-6
    model = LogisticRegression(C=summary["strength"], **SOLVER).fit(
        (x - mean) / scale, [known[n] for n in some]
    )
    assert list(model.classes_) == sorted(CLASSES)
    assert_of_probabilities(rows, model.predict_proba((made.vectors - mean) / scale), sorted(CLASSES))
    assert summary["trained_on"] == len(some)
    unseen = [n for n, label in enumerate(known) if label is None and made.labels[n] is not None]
    accuracy = np.mean([rows[n]["label"] == made.labels[n] for n in unseen])
    found = summary["cross_validation"]
    assert found["accuracy_low"] - 0.05 < accuracy < found["accuracy_high"] + 0.05
    assert [row["class"] for row in found["per_class"]] == sorted(CLASSES)
    assert sum(row["images"] for row in found["per_class"]) == len(some)
    assert all(row["recall_low"] <= row["recall"] <= row["recall_high"] for row in found["per_class"])
    curve = summary["learning_curve"]
    assert [point["labels"] for point in curve] == sorted(point["labels"] for point in curve)
    assert curve[-1]["accuracy"] > curve[0]["accuracy"]


def test_a_saved_probe_labels_later_images_without_labels(made: Made, tmp_path: Path) -> None:
    path, _ = few(made, tmp_path)
    rows, summary = labelled(made, method="probe", labels=str(path))
    saved = made.output.path(f"labels/{summary['version']}/probe.safetensors")
    kept = tmp_path / "probe.safetensors"
    kept.write_bytes(Path(saved).read_bytes())
    again, _ = labelled(made, method="probe", probe=str(kept))
    assert again == rows


def test_a_probe_of_other_embeddings_or_of_none_is_refused(made: Made, tmp_path: Path) -> None:
    other = Probe(np.zeros((2, 16), np.float32), np.zeros(2, np.float32), ("a", "b"), "another")
    (tmp_path / "other.safetensors").write_bytes(other.to_bytes())
    with pytest.raises(FingerprintError, match="embeddings made otherwise"):
        labelled(made, method="probe", probe=str(tmp_path / "other.safetensors"))
    for junk in (b"", b"junk" * 10, json.dumps({}).encode()):
        (tmp_path / "junk.safetensors").write_bytes(junk)
        with pytest.raises(InputError, match=r"junk\.safetensors is not a saved probe"):
            labelled(made, method="probe", probe=str(tmp_path / "junk.safetensors"))
    with pytest.raises(InputError, match=r"gone\.safetensors is not a saved probe"):
        labelled(made, method="probe", probe=str(tmp_path / "gone.safetensors"))


def test_two_classes_and_classes_of_one_image_can_be_probed(made: Made, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    label = (vectors[:, 0] > 0).astype(np.int32)
    weight, bias = train(vectors, label, 2, 1.0)
    model = LogisticRegression(C=1.0, **SOLVER).fit(
        (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6), label
    )
    mine = softmax(vectors @ weight.T + bias)
    wanted = model.predict_proba((vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6))
    np.testing.assert_allclose(mine, wanted, atol=1e-4)

    names = ["ant", "ant", "bee", "bee", "rare"]
    write_labels(tmp_path / "few.csv", [f"a#{n}" for n in range(5)], names)
    _, summary = labelled(made, method="probe", labels=str(tmp_path / "few.csv"))
    assert summary["trained_on"] == 5
    assert summary["cross_validation"]["judged"] == 4


def test_a_class_that_is_nearly_all_there_is_can_be_probed(made: Made, tmp_path: Path) -> None:
    """Some parts of the cross-validation then train on one class alone."""
    names = ["ant"] * 40 + ["bee", "bee"]
    write_labels(tmp_path / "few.csv", [f"a#{n}" for n in range(42)], names)
    rows, summary = labelled(made, method="probe", labels=str(tmp_path / "few.csv"))
    assert summary["cross_validation"]["judged"] == 42
    assert summary["cross_validation"]["accuracy"] > 0.9
    assert set(column(rows, "label")) <= {"ant", "bee"}
    weight, bias = train(made.vectors[:5], np.full(5, 2, np.int32), 3, 1.0)
    assert softmax(made.vectors[:5] @ weight.T + bias).tolist() == [[0, 0, 1]] * 5


def test_images_whose_label_is_known_can_keep_it(made: Made, tmp_path: Path) -> None:
    path, known = few(made, tmp_path)
    config = {"method": "neighbours", "labels": str(path), "keep_known": True, "coarser": COARSER}
    rows, _ = labelled(made, **config)
    for row, label in zip(rows, known, strict=True):
        if label is None:
            assert row["method"] == "neighbours"
        else:
            assert (row["label"], row["method"], row["score"]) == (COARSER.get(label, label), "given", 1)
            assert row["margin"] is None


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"thresholds": {"cat": 0.5}}, ConfigError, "label.thresholds: there is no class cat; the classes"),
        ({"coarser": {"cat": "mammal"}}, ConfigError, "label.coarser: there is no class cat"),
        ({"method": "neighbours"}, ConfigError, "label.labels: this needs images whose label is known"),
        ({"method": "probe"}, ConfigError, "needs images whose label is known"),
        ({"labels": "colour"}, InputError, "no column colour"),
        ({"method": "probe", "labels": "ONE"}, InputError, "fewer than two classes"),
        ({"method": "probe", "labels": "SINGLES"}, InputError, "one image of each class alone"),
        ({"labels": "ONE"}, InputError, "2 images of .* have a label, a calibration needs 20"),
        ({"labels": "OTHERS"}, InputError, "none of these labels is a class of the model"),
        ({"method": "neighbours", "labels": "STRANGERS"}, InputError, "none of the 240 images"),
    ],
)
def test_what_cannot_be_done_is_said(
    made: Made, tmp_path: Path, config: dict[str, Any], kind: type[Exception], message: str
) -> None:
    files = {
        "ONE": [("a#0", "ant"), ("a#1", "ant")],
        "SINGLES": [("a#0", "ant"), ("a#1", "bee")],
        "OTHERS": [("a#0", "car"), ("a#1", "bus")],
        "STRANGERS": [("z#0", "ant"), ("z#1", "bee")],
    }
    named = config.get("labels")
    if named in files:
        table = pa.table({"image_id": [a for a, _ in files[named]], "label": [b for _, b in files[named]]})
        pa_csv.write_csv(table, tmp_path / "labels.csv")
        config = {**config, "labels": str(tmp_path / "labels.csv")}
    before = sorted(info.path for info in made.output.find("labels"))
    with pytest.raises(kind, match=message):
        labelled(made, **config)
    assert sorted(info.path for info in made.output.find("labels")) == before


def test_a_model_without_a_classifier_has_no_head_to_label_by(tmp_path: Path) -> None:
    output = empty_output(tmp_path / "out")
    commit_vectors(output, "a", np.ones((3, 4), np.float32))
    with pytest.raises(InputError, match="has no classifier; use neighbours or probe"):
        make_labels(output, LabelConfig())


def test_rows_stream_whatever_the_number_of_classes(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_module, "MOST_CELLS", 64 * len(CLASSES))
    sizes: list[int] = []
    columns = Rule.columns

    def noting(self: Rule, ids: pa.Array, p: np.ndarray, method: str) -> pa.Table:
        sizes.append(len(p))
        return columns(self, ids, p, method)

    monkeypatch.setattr(Rule, "columns", noting)
    rows, _ = labelled(made)
    assert max(sizes) == 64
    assert sum(sizes) == len(rows) == 240


def test_a_labelling_that_dies_leaves_the_served_version(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, summary = labelled(made)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_module, "_labelled", die)
        with pytest.raises(KeyboardInterrupt):
            make_labels(made.output, LabelConfig(threshold=0.9))
    assert made.output.read_bytes("labels/CURRENT").decode() == summary["version"]
    assert column(table_of(made.output).to_pylist(), "label").count("unknown") == 0
    assert len(before) == 240


def test_intervals_are_wilson_s() -> None:
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # by statsmodels
    assert interval(0, 0) == (0.0, 1.0)
    assert interval(5, 5)[1] == 1.0


def test_the_command_tells_what_it_made(made: Made, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("ant: insect\nbee: insect\n")
    done = cli(
        *("label", made.output.uri, "--map", tmp_path / "map.yaml"),
        *("label.threshold=0.5", "--labels", "kind", "--json"),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["fingerprint"] == require_fingerprint(made.output).digest
    assert "insect" in summary["labels"]
    assert "calibrated on 230 images: temperature" in done.stderr
    assert f"labels/{summary['version']}/labels.parquet" in done.stderr
    for words, message in (
        (["--from", "hand"], "label.method: found 'hand'; allowed: 'head', 'neighbours', 'probe'"),
        (["label.treshold=0.5"], "label.treshold: unknown key; did you mean threshold?"),
        (["--map", tmp_path / "none.yaml"], "cannot read --map"),
        (["label.threshold=2"], "label.threshold: found 2"),
    ):
        wrong = cli("label", made.output.uri, *words)
        assert wrong.returncode == 2, wrong.stderr
        assert message in wrong.stderr
