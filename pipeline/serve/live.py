"""What is served now: rows, labels and the index of one moment, and filters over them.

Enters: an output. Leaves: a `View`, which stays as it is while the output changes. Rows are
known by their numbers in the catalogue, as vectors are by their faiss ids in the index.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipeline.commits import EMBEDDINGS, CommitLog
from pipeline.errors import SearchError
from pipeline.index.record import current_version
from pipeline.index.vectors import Ids, Mask
from pipeline.labels.decide import UNKNOWN
from pipeline.labels.make import FILE, LABELS
from pipeline.originals import Originals
from pipeline.published import SUMMARY, served_version
from pipeline.search import Searcher
from pipeline.serve.batcher import Batcher
from pipeline.serve.catalogue import NO_VALUE, Catalogue, Facet
from pipeline.serve.once import cached_arrays
from pipeline.storage import Storage
from pipeline.totals import mark_of
from pipeline.where import columns_in, matching_ids, matching_rows

LABEL = "label"
_MASKS = 16
_BATCH_ROWS = 65_536

State = tuple[int, str | None, str | None]


@dataclass(frozen=True)
class Labels:
    """The label of every row: of the served version, or what extract wrote where there is none."""

    version: str | None
    unknown_is_none: bool  # whether `unknown` stands for no label, and is none of the classes
    facet: Facet
    scores: npt.NDArray[np.float32]
    margins: npt.NDArray[np.float32]  # score less the next class's; the score where that is not known


def state_of(output: Storage, log: CommitLog) -> State:
    """What a view depends on: another value, and there is something new to serve."""
    return mark_of(log.live), current_version(output), served_version(output, LABELS)


class View:
    """One moment of an output. `searcher` raises SearchError where there is no index."""

    def __init__(
        self,
        output: Storage,
        cache: Path,
        pool: Executor,
        input_options: Mapping[str, Any] | None = None,
        where_timeout_s: float = 10,
    ) -> None:
        self._log = CommitLog(output)
        self.state = state_of(output, self._log)
        self.originals = Originals(output, input_options)
        self._output, self._where_timeout_s = output, where_timeout_s
        self.catalogue, self._name = Catalogue.of(output, self._log, cache)
        self._cache = cache
        self.labels = self._labels(self.state[2])
        self.facets: dict[str, Facet] = {**self.catalogue.facets}
        if self.labels is not None:
            self.facets = {LABEL: self.labels.facet, **{k: v for k, v in self.facets.items() if k != LABEL}}
        self._searcher: Searcher | None = None
        self.no_index = ""
        try:
            self._searcher = Searcher(output)
        except SearchError as error:
            self.no_index = str(error)
        else:
            self.faiss_ids, self.rows = self._numbers(self._searcher)
            self.batcher = Batcher(self._searcher.search, pool)
        self._masks: OrderedDict[tuple[Any, ...], Mask] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def searcher(self) -> Searcher:
        if self._searcher is None:
            raise SearchError(self.no_index)
        return self._searcher

    @property
    def has_index(self) -> bool:
        return self._searcher is not None

    def mask(self, where: str | None, chosen: tuple[tuple[str, str], ...] = ()) -> Mask | None:
        """Which rows pass a filter and have one of the values chosen of each facet; None: all do.

        Raises SearchError for a filter that cannot be evaluated, or a facet that there is not.
        """
        key = (where, chosen)
        if key == (None, ()):
            return None
        with self._lock:
            if key in self._masks:
                self._masks.move_to_end(key)
                return self._masks[key]
        mask = np.ones(len(self.catalogue), np.bool_) if where is None else self._where(where)
        for name in dict.fromkeys(name for name, _ in chosen):
            wanted = [value for column, value in chosen if column == name]
            mask = mask & self._with_values(name, wanted)
        with self._lock:
            self._masks[key] = mask
            while len(self._masks) > _MASKS:
                self._masks.popitem(last=False)
        return mask

    def indexed(self, mask: Mask) -> Mask:
        """Flags by faiss id of flags by row."""
        flags = np.zeros(len(self.rows), np.bool_)
        known = self.rows >= 0
        flags[known] = mask[self.rows[known]]
        return flags

    def counts(self, mask: Mask | None) -> dict[str, list[tuple[str, int]]]:
        """How many rows have each value of each facet, the most frequent first."""
        found = {}
        for name, facet in self.facets.items():
            codes = facet.codes if mask is None else facet.codes[mask]
            counts = np.bincount(codes[codes != NO_VALUE], minlength=len(facet.values)).tolist()
            pairs = [(text_of(it), n) for it, n in zip(facet.values, counts, strict=True) if n]
            found[name] = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
        return found

    def label_of(self, row: int) -> tuple[str | None, float | None]:
        """The label of a row and its score."""
        if self.labels is None:
            return None, None
        code = int(self.labels.facet.codes[row])
        return (
            (None, None) if code < 0 else (self.labels.facet.values[code], float(self.labels.scores[row]))
        )

    def _where(self, where: str) -> Mask:
        mask = np.zeros(len(self.catalogue), np.bool_)
        timeout_s = self._where_timeout_s
        if columns_in(where) <= set(self.catalogue.schema.names):
            rows = matching_rows(self.catalogue.tables, where, timeout_s=timeout_s).to_numpy()
        else:  # vectors, which lie in the files alone
            files = [f"{EMBEDDINGS}/{stem}.parquet" for stem in sorted(self._log.live)]
            ids = matching_ids(self._output, files, where, timeout_s=timeout_s)
            rows = self.catalogue.rows_of(ids.to_pylist())
            rows = rows[rows >= 0]
        mask[rows] = True
        return mask

    def _with_values(self, name: str, wanted: list[str]) -> Mask:
        facet = self.facets.get(name)
        if facet is None:
            raise SearchError(f"{name} is no facet; there are {', '.join(self.facets) or 'none'}")
        codes = [number for number, value in enumerate(facet.values) if text_of(value) in wanted]
        mask: Mask = np.isin(facet.codes, np.array(codes, np.int32))
        return mask

    def _numbers(self, searcher: Searcher) -> tuple[Ids, Ids]:
        """The faiss id of every row, and the row of every faiss id; -1 where there is none."""

        def match() -> dict[str, Ids]:
            faiss_ids = np.full(len(self.catalogue), -1, np.int64)
            rows = np.full(searcher.record.next_id, -1, np.int64)
            for names, ids in searcher.id_batches(_BATCH_ROWS):
                places = self.catalogue.rows_of(names)
                known = places >= 0
                rows[ids[known]] = places[known]
                faiss_ids[places[known]] = ids[known]
            return {"faiss_ids": faiss_ids, "rows": rows}

        arrays = cached_arrays(self._cache / f"{self._name}-index-{searcher.record.version}", match)
        return arrays["faiss_ids"], arrays["rows"]

    def _labels(self, version: str | None) -> Labels | None:
        facet = self.catalogue.facets.get(LABEL)
        if version is None and facet is None:
            return None
        if version is None and facet is not None:
            arrays = cached_arrays(self._cache / f"{self._name}-labels-extract", self._scores_of_extract)
            return Labels(None, False, facet, arrays["scores"], arrays["scores"])
        folder = f"{LABELS}/{version}"
        summary = json.loads(self._output.read_bytes(f"{folder}/{SUMMARY}"))
        values = {name: number for number, name in enumerate(summary["labels"])}
        arrays = cached_arrays(
            self._cache / f"{self._name}-labels-{version}", lambda: self._read_labels(folder, values)
        )
        facet = Facet(tuple(values), arrays["codes"])
        none = UNKNOWN not in summary["label_names"]
        return Labels(version, none, facet, arrays["scores"], arrays["margins"])

    def _scores_of_extract(self) -> dict[str, npt.NDArray[np.float32]]:
        tables = self.catalogue.tables(["score"])
        parts = [table.column(0).fill_null(0).to_numpy() for table in tables]
        return {"scores": np.concatenate([np.empty(0, np.float32), *parts]).astype(np.float32)}

    def _read_labels(self, folder: str, values: dict[str, int]) -> dict[str, npt.NDArray[Any]]:
        count = len(self.catalogue)
        codes = np.full(count, NO_VALUE, np.int32)
        scores, margins = np.zeros(count, np.float32), np.zeros(count, np.float32)
        with self._output.local_copy(f"{folder}/{FILE}") as path, pq.ParquetFile(path) as file:
            columns = ["image_id", "label", "score", "margin"]
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                rows = self.catalogue.rows_of(batch.column(0).to_pylist())
                known = rows >= 0
                places = rows[known]
                codes[places] = np.array([values[it] for it in batch.column(1).to_pylist()], np.int32)[
                    known
                ]
                score = batch.column(2).to_numpy()
                margin = batch.column(3).to_numpy(zero_copy_only=False)
                scores[places] = score[known]
                margins[places] = np.where(np.isnan(margin), score, margin)[known]
        return {"codes": codes, "scores": scores, "margins": margins}


def text_of(value: Any) -> str:
    """A facet's value as addresses and pages name it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
