"""The demo's corpus, read back with tarfile and Pillow; nothing here may touch the network."""

from __future__ import annotations

import io
import json
import socket
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image

from pipeline.demo_corpus import PHOTOGRAPHS, DemoCorpus, make_corpus, photograph_of
from pipeline.errors import InputError

BROKEN_KEY = "broken-"


@dataclass(frozen=True)
class Stored:
    """One sample as a reader finds it."""

    image_id: str
    key: str
    extension: str
    image: bytes
    metadata: dict[str, Any]


def read_shard(path: Path) -> list[Stored]:
    with tarfile.open(path) as tar:
        contents = {member.name: _content(tar, member) for member in tar}
    samples = []
    for name, content in contents.items():
        key, _, extension = name.partition(".")
        if extension != "json":
            metadata = json.loads(contents[f"{key}.json"])
            samples.append(Stored(f"{path.name}#{key}", key, extension, content, metadata))
    return samples


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def shards_of(corpus: DemoCorpus) -> list[Path]:
    return sorted(corpus.folder.glob("*.tar"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    pytest.importorskip("skimage")

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the corpus is made offline")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def samples(corpus: DemoCorpus) -> list[Stored]:
    return [sample for path in shards_of(corpus) for sample in read_shard(path)]


@pytest.fixture(scope="module")
def good(samples: list[Stored]) -> list[Stored]:
    return [sample for sample in samples if not sample.key.startswith(BROKEN_KEY)]


@pytest.fixture(scope="module")
def broken(samples: list[Stored]) -> list[Stored]:
    return [sample for sample in samples if sample.key.startswith(BROKEN_KEY)]


def test_the_same_seed_writes_the_same_bytes(corpus: DemoCorpus, tmp_path: Path) -> None:
    again = make_corpus(tmp_path)
    assert [path.name for path in shards_of(again)] == [f"demo-{n:06d}.tar" for n in range(8)]
    for first, second in zip(shards_of(corpus), shards_of(again), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_another_seed_and_number_of_shards_make_another_corpus_of_the_same_size(
    corpus: DemoCorpus, good: list[Stored], tmp_path: Path
) -> None:
    other = make_corpus(tmp_path, num_shards=1, seed=1)
    stored = [sample for path in shards_of(other) for sample in read_shard(path)]
    assert len(shards_of(other)) == 1
    assert (other.num_images, other.num_broken) == (corpus.num_images, corpus.num_broken)
    assert len(stored) == other.num_images + other.num_broken
    images = {sample.key: sample.image for sample in stored}
    cropped = [sample for sample in good if "cropped" in sample.metadata["variant"]]
    assert cropped
    assert all(images[sample.key] != sample.image for sample in cropped)


def test_counts_are_those_of_the_shards_and_every_good_image_decodes(
    corpus: DemoCorpus, samples: list[Stored], good: list[Stored], broken: list[Stored]
) -> None:
    assert (len(good), len(broken)) == (corpus.num_images, corpus.num_broken)
    assert len({sample.key for sample in samples}) == len(samples)
    formats = set()
    for sample in good:
        with Image.open(io.BytesIO(sample.image)) as image:
            image.load()
            assert max(image.size) <= 512
            assert Image.registered_extensions()[f".{sample.extension}"] == image.format
            formats.add(image.format)
    assert formats == {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"}


def test_every_photograph_has_many_variants_and_one_of_them_is_the_original(
    corpus: DemoCorpus, good: list[Stored]
) -> None:
    counts = Counter(sample.metadata["photograph"] for sample in good)
    assert set(counts) == set(corpus.photographs) == set(PHOTOGRAPHS)
    assert min(counts.values()) >= 20
    originals = [s for s in good if s.metadata["variant"] == "original"]
    assert sorted(s.metadata["photograph"] for s in originals) == sorted(corpus.photographs)


def test_variants_of_a_photograph_are_spread_over_the_shards(corpus: DemoCorpus) -> None:
    for path in shards_of(corpus):
        shown = {sample.metadata["photograph"] for sample in read_shard(path)}
        assert len(shown) > len(corpus.photographs) / 2


def test_turned_variants_have_no_empty_corners(good: list[Stored]) -> None:
    """Where a photograph has no black of its own, black is what a turn left in a corner."""
    darkest = {
        sample.metadata["photograph"]: darkest_pixel(sample)
        for sample in good
        if sample.metadata["variant"] == "original"
    }
    turned = [
        sample
        for sample in good
        if "turned" in sample.metadata["variant"] and darkest[sample.metadata["photograph"]] >= 40
    ]
    assert len(turned) >= 10
    for sample in turned:
        assert darkest_pixel(sample) >= 15, sample.key


def darkest_pixel(sample: Stored) -> int:
    with Image.open(io.BytesIO(sample.image)) as image:
        return min(image.convert("L").tobytes())


def test_broken_files_do_not_decode_and_stand_in_several_shards(broken: list[Stored]) -> None:
    assert {sample.extension for sample in broken} >= {"jpg", "png"}
    assert b"" in [sample.image for sample in broken]
    assert len({sample.image_id.partition("#")[0] for sample in broken}) == len(broken)
    for sample in broken:
        assert sample.metadata["photograph"] is None
        with pytest.raises((OSError, SyntaxError)):
            Image.open(io.BytesIO(sample.image)).load()


def test_photograph_of_an_image_id_is_that_of_its_metadata(good: list[Stored]) -> None:
    for sample in good:
        assert photograph_of(sample.image_id) == sample.metadata["photograph"]


@pytest.mark.parametrize(
    "image_id", ["demo-000000.tar#broken-00", "demo-000000.tar#dog-01", "chelsea-07", "", "#"]
)
def test_photograph_of_refuses_an_id_that_shows_no_photograph(image_id: str) -> None:
    with pytest.raises(ValueError, match="not an image of the demo's corpus"):
        photograph_of(image_id)


def test_without_scikit_image_the_error_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"pip install 'cvt-pipeline\[demo\]'"):
        make_corpus(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_corpus_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        make_corpus(tmp_path, num_shards=0)
