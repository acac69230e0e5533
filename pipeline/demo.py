"""The whole way, offline: a corpus of photographs, extract, index, search, and how well that went."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cvt_model.presets import DEFAULT_MODEL
from pipeline.commits import CommitLog
from pipeline.config import Config, InputConfig, ModelConfig, OutputConfig
from pipeline.demo_corpus import make_corpus, photograph_of
from pipeline.extract import OnProgress, extract
from pipeline.gallery import Row, gallery_page
from pipeline.index.build import build_index
from pipeline.index.vectors import read_vectors
from pipeline.originals import Originals
from pipeline.search import Searcher
from pipeline.stop import Stop
from pipeline.storage import Storage
from pipeline.tally import Tally

GALLERY_QUERIES = 12
GALLERY_HITS = 8


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows: the run, the share of variants that found their photograph, the page."""

    tally: Tally
    num_photographs: int
    num_images: int
    num_broken: int
    share_found: float
    gallery: Path


def demo(folder: Path, *, stop: Stop, on_progress: OnProgress, started: float) -> DemoResult:
    """Run the demo in `folder`; a second demo in it starts anew."""
    shards, features = folder / "shards", folder / "features"
    shards.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(shards)
    stop.check()
    config = Config(
        input=InputConfig(uri=str(shards), format="webdataset", metadata_columns=("json",)),
        model=ModelConfig(checkpoint=DEFAULT_MODEL, precision="float32"),
        output=OutputConfig(uri=str(features)),
    )
    tally = extract(config, stop=stop, on_progress=on_progress, started=started)
    stop.check()
    output = Storage(str(features))
    build_index(output)
    searcher = Searcher(output)
    share_found = _share_found(output, searcher)
    gallery = folder / "gallery.html"
    gallery.write_text(_gallery(output, searcher, corpus.photographs, share_found), encoding="utf-8")
    return DemoResult(
        tally, len(corpus.photographs), corpus.num_images, corpus.num_broken, share_found, gallery
    )


def _share_found(output: Storage, searcher: Searcher) -> float:
    """Share of the images whose nearest other image is a variant of the same photograph."""
    log = CommitLog(output)
    found: list[bool] = []
    for commit in log.read(log.live):
        for names, vectors in read_vectors(output, commit.embeddings.path):
            for name, neighbours in zip(names.to_pylist(), searcher.nearest(vectors, 2), strict=True):
                other = next(image_id for image_id, _ in neighbours if image_id != name)
                found.append(photograph_of(other) == photograph_of(name))
    return float(np.mean(found))


def _gallery(output: Storage, searcher: Searcher, photographs: tuple[str, ...], share_found: float) -> str:
    originals, rows = Originals(output), []
    first = {photograph_of(name): name for name in reversed(searcher.image_ids)}
    step = max(1, len(photographs) // GALLERY_QUERIES)
    for photograph in photographs[::step][:GALLERY_QUERIES]:
        hits = searcher.by_id(first[photograph], GALLERY_HITS + 1)
        query, others = hits[0], hits[1:]
        image = originals.read(query.shard, query.key) if query.shard and query.key else None
        unlabelled = [replace(hit, label=None) for hit in others]  # none of the ten classes is an astronaut
        rows.append(Row(query.image_id, image, unlabelled))
    note = (
        f"{share_found:.1%} of all variants find another variant of their own photograph first. Made "
        f"{time.strftime('%Y-%m-%d %H:%M')} by {DEFAULT_MODEL}, which was trained on the ten classes "
        "of CIFAR-10 at 32 × 32 pixels: these photographs show other things, so no labels stand here."
    )
    return gallery_page(
        "CvT pipeline demo: each photograph and its nearest neighbours", note, rows, originals.read
    )
