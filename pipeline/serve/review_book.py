"""The decisions of an output's reviews at hand: what holds of each image, and what is said next.

A decision is in its file before anybody is told that it was taken. What other servers, or other people's
pages, said is read on `refresh`. For any number of threads.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

from pipeline.errors import InputError
from pipeline.labels.reviews import Decision, hold, list_files, read_files, record
from pipeline.storage import Storage


class ReviewBook:
    """What was said, by image."""

    def __init__(self, output: Storage) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._files: dict[str, list[Decision]] = {}
        self._by_image: dict[str, list[Decision]] = defaultdict(list)
        self.refresh()

    def refresh(self) -> bool:
        """Read what others said; whether they said anything. Raises OutputError for a damaged file."""
        with self._lock:
            new = [path for path in list_files(self._output) if path not in self._files]
            if not new:
                return False
            self._files |= read_files(self._output, new)
            by_image: dict[str, list[Decision]] = defaultdict(list)
            for path in sorted(self._files):  # named by the time at which it was said
                for decision in self._files[path]:
                    by_image[decision.image_id].append(decision)
            self._by_image = by_image  # at once, for those who look meanwhile
            return True

    def say(self, decisions: Sequence[Decision]) -> None:
        """Keep decisions; they are durable when this returns.

        Raises InputError, and keeps none, where one would undo what nobody decided, or what was undone.
        """
        with self._lock:
            for decision in decisions:
                if decision.action == "undo" and not self._can_undo(decision):
                    raise InputError(f"there is no such decision on {decision.image_id} to undo any more")
            path = record(self._output, decisions, max(self._files, default=""))
            self._files[path] = list(decisions)
            for decision in decisions:
                self._by_image[decision.image_id].append(decision)

    def _can_undo(self, undo: Decision) -> bool:
        said = self._by_image.get(undo.image_id, [])
        if not undo.undoes:
            return self._held(undo.image_id) is not None
        undone = {it.undoes for it in said}
        return undo.undoes not in undone and any(it.id == undo.undoes for it in said)

    def of(self, image_id: str) -> Decision | None:
        """What holds of an image."""
        return self._held(image_id)

    def held(self) -> dict[str, Decision]:
        """What holds now, by image."""
        with self._lock:
            found = ((image_id, self._held(image_id)) for image_id in self._by_image)
            return {image_id: decision for image_id, decision in found if decision is not None}

    def _held(self, image_id: str) -> Decision | None:
        said = self._by_image.get(image_id)
        return hold(said).get(image_id) if said else None
