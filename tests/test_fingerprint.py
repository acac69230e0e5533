"""The fingerprint: what changes results changes it, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cvt_model.image_processor import CvtImageProcessor
from pipeline.errors import FingerprintError, OutputError
from pipeline.fingerprint import FILE, Fingerprint, claim, preprocessing_of, read_fingerprint
from pipeline.storage import Storage

BASE = Fingerprint(
    source="/models/a",
    weights_sha256="00",
    model_config={"depth": [1, 2], "id2label": {str(n): f"class {n}" for n in range(20)}, "eps": 1e-12},
    preprocessing={"size": {"shortest_edge": 224}},
    precision="float32",
    embedding="pooled",
    columns={"logits": "full", "dtype": "float32", "id_column": None, "metadata": {"a": "int64"}},
)

CHANGES = [
    {"weights_sha256": "01"},
    {"model_config": {**BASE.model_config, "depth": [1, 3]}},
    {"preprocessing": {"size": {"shortest_edge": 225}}},
    {"precision": "bfloat16"},
    {"embedding": "cls_token"},
    {"columns": {**BASE.columns, "logits": 5}},
    {"columns": {**BASE.columns, "metadata": {"a": "int32"}}},
    {"columns": {**BASE.columns, "metadata": {}}},
]


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.mark.parametrize("change", CHANGES)
def test_everything_that_changes_results_changes_the_digest_and_is_refused(
    output: Storage, change: dict[str, object]
) -> None:
    claim(output, BASE)
    other = dataclasses.replace(BASE, **change)
    assert other.digest != BASE.digest
    with pytest.raises(FingerprintError, match=next(iter(change))):
        claim(output, other)
    assert read_fingerprint(output) == BASE


def test_fast_decoding_is_another_fingerprint_and_exact_is_what_it_always_was(output: Storage) -> None:
    processor = CvtImageProcessor(size=224)
    exact, fast = (
        dataclasses.replace(BASE, preprocessing=preprocessing_of(processor, fast=fast))
        for fast in (False, True)
    )
    assert exact.preprocessing == processor.to_dict()
    assert (exact.fast_decode, fast.fast_decode) == (False, True)
    claim(output, exact)
    with pytest.raises(FingerprintError, match=r'preprocessing\.decode: the output has null, now "fast"'):
        claim(output, fast)


def test_the_place_of_the_checkpoint_changes_nothing(output: Storage) -> None:
    claim(output, BASE)
    claim(output, dataclasses.replace(BASE, source="elsewhere"))
    assert read_fingerprint(output) == BASE


def test_a_refusal_names_the_innermost_key_and_both_values(output: Storage) -> None:
    claim(output, BASE)
    other = dataclasses.replace(BASE, columns={**BASE.columns, "metadata": {"a": "string"}})
    with pytest.raises(FingerprintError, match=r'columns\.metadata\.a: the output has "int64", now "str'):
        claim(output, other)


def test_the_digest_survives_the_file(output: Storage) -> None:
    claim(output, BASE)
    again = read_fingerprint(output)
    assert again == BASE
    assert again.digest == BASE.digest == json.loads(output.read_bytes(FILE))["digest"]


def test_a_new_output_has_none(output: Storage) -> None:
    assert read_fingerprint(output) is None


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff"])
def test_a_file_that_is_no_fingerprint_is_told(output: Storage, data: bytes) -> None:
    output.write_bytes(FILE, data)
    with pytest.raises(OutputError, match=r"fingerprint\.json: not a fingerprint"):
        claim(output, BASE)


def test_of_two_first_runs_at_once_the_second_obeys_the_first(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Storage.create

    def create_later(self: Storage, relative: str, data: bytes) -> None:
        create(self, relative, json.dumps(BASE.to_json()).encode())
        create(self, relative, data)

    monkeypatch.setattr(Storage, "create", create_later)
    with pytest.raises(FingerprintError, match="precision"):
        claim(output, dataclasses.replace(BASE, precision="float16"))
