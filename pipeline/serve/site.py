"""All that a server holds: the output, what of it is served now, and what it makes for itself.

Enters: an output and the configuration. Leaves: rows as the page shows them. `refresh` moves on to what
runs have added meanwhile; a request keeps the view with which it began.
"""

from __future__ import annotations

import base64
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cvt_model.cache import cache_folder
from pipeline import schema
from pipeline.commits import CommitLog
from pipeline.config import ServeConfig
from pipeline.errors import PipelineError
from pipeline.fingerprint import require_fingerprint
from pipeline.index.engine import leave_threads
from pipeline.index.vectors import Mask
from pipeline.labels.reviews import Decision
from pipeline.serve.catalogue import Catalogue
from pipeline.serve.live import View, state_of
from pipeline.serve.review_book import ReviewBook
from pipeline.serve.thumbnails import Thumbnails
from pipeline.serve.uploads import Uploads
from pipeline.storage import Storage

_OURS = ("image_id", "shard", "key", "width", "height", "format", "sha256", "label", "label_id", "score")

logger = logging.getLogger(__name__)


class Site:
    """An output, open for visitors. Raises ConfigError where it is none."""

    def __init__(
        self,
        output: Storage,
        config: ServeConfig,
        input_options: Mapping[str, Any],
        cache: Path | None = None,
    ) -> None:
        require_fingerprint(output)
        self.output, self.config = output, config
        self._cache = cache or cache_folder() / "serve"
        self._input_options = input_options
        self.pool = ThreadPoolExecutor(1, "search", leave_threads)  # FAISS has threads of its own
        self.reviews = ReviewBook(output)
        self.uploads = Uploads(self._cache / "uploads", config.max_upload_pixels)
        self.thumbnails = Thumbnails(self._cache / "thumbnails", config.thumbnail_bytes)
        self._deciding = threading.Lock()  # a decision is in the flags that are served next, too
        self.view = self._next_view()
        self.decided = self._decided(self.view)

    def refresh(self) -> bool:
        """Serve what there is now; whether that is anything new. What fails is told in the log alone."""
        try:
            if self.reviews.refresh():
                with self._deciding:
                    self.decided = self._decided(self.view)
        except (PipelineError, OSError) as error:
            logger.warning("what others decided cannot be read: %s", error)
        try:
            if state_of(self.output, CommitLog(self.output)) == self.view.state:
                return False
            view = self._next_view()
        except (PipelineError, OSError, pa.ArrowException) as error:
            logger.warning("what is new cannot be served yet: %s", error)
            return False
        with self._deciding:
            self.view, self.decided = view, self._decided(view)
        logger.info("serving %s rows, index %s, labels %s", f"{len(view.catalogue):,}", *view.state[1:])
        return True

    def close(self) -> None:
        """End what runs beside this process."""
        self.uploads.close()
        self.pool.shutdown(wait=False)

    def decide(self, decisions: Sequence[Decision]) -> None:
        """Keep decisions; they are durable when this returns. Raises as `ReviewBook.say`."""
        with self._deciding:
            self.reviews.say(decisions)
            catalogue, flags = self.decided
            for decision in decisions:
                row = catalogue.row_of(decision.image_id)
                if row is not None:
                    flags[row] = self.reviews.of(decision.image_id) is not None

    def decided_rows(self, view: View) -> Mask:
        """Which rows of a view a decision holds of."""
        catalogue, flags = self.decided
        return flags if catalogue is view.catalogue else self._decided(view)[1]

    def images(
        self, view: View, rows: Sequence[int], scores: Sequence[float] | None = None
    ) -> list[dict[str, Any]]:
        """Rows of a view as the page shows them, with the cosines that they were found by."""
        shown = []
        for number, (row, values) in enumerate(zip(rows, view.catalogue.get(rows), strict=True)):
            label, label_score = view.label_of(row)
            decision = self.reviews.of(values[schema.IMAGE_ID])
            image = {
                "image_id": values[schema.IMAGE_ID],
                "shard": values.get("shard"),
                "key": values.get("key"),
                "label": label,
                "label_score": plain(label_score),
                "width": values.get("width"),
                "height": values.get("height"),
                "format": values.get("format"),
                "sha256": plain(values.get("sha256")),
                "metadata": {name: plain(it) for name, it in values.items() if name not in _OURS},
                "decision": None
                if decision is None
                else {name: getattr(decision, name) for name in ("action", "label", "reviewer", "id")},
            }
            if scores is not None:
                image["score"] = float(scores[number])
            shown.append(image)
        return shown

    def _next_view(self) -> View:
        folder, timeout_s = self._cache / "views", self.config.where_timeout_s
        return View(self.output, folder, self.pool, self._input_options, timeout_s)

    def _decided(self, view: View) -> tuple[Catalogue, Mask]:
        """Which rows of a view's catalogue a decision holds of."""
        flags = np.zeros(len(view.catalogue), np.bool_)
        rows = view.catalogue.rows_of(self.reviews.held())
        flags[rows[rows >= 0]] = True
        return view.catalogue, flags


def plain(value: Any) -> Any:
    """A cell of a row as JSON can say it."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return value.hex() if len(value) <= 64 else base64.b64encode(value).decode()
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal() | timedelta():
            return str(value)
        case dict():
            return {str(name): plain(inner) for name, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case None | bool() | int() | str():
            return value
    return str(value)
