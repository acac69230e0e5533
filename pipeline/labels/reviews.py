"""What people decided of labels: kept as it was said, and what holds of it now.

Enters: decisions. Leaves: `labels/reviews/<time>.json`, a file for what was said at once, created whole and
never changed, so that a killed server loses none. An undo is said as well; it names the decision that it
takes back, so that it is right whatever others said meanwhile.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from itertools import chain
from typing import Any, Literal, get_args

from pipeline.errors import OutputError
from pipeline.storage import NAME_TIME, Storage, unique_name

FOLDER = "labels/reviews"
_READ_THREADS = 16
_NEWER = ("id", "undoes")  # records of earlier versions lack them

Action = Literal["accept", "reject", "relabel", "undo"]


@dataclass(frozen=True)
class Decision:
    """What somebody said of an image's label.

    `label` is the one that is right from then on: what was accepted, or what it was changed to; None where
    it was rejected, or where a decision was undone. `before` is the label that was shown. `undoes` is the
    id of what an undo takes back; without it, that is the last decision on the image that still holds.
    """

    image_id: str
    action: Action
    label: str | None
    before: str | None = None
    reviewer: str = ""
    at: str = ""
    undoes: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12], compare=False)

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise ValueError(f"action: found {self.action!r}; allowed: {', '.join(get_args(Action))}")
        if (self.label is None) != (self.action in ("reject", "undo")):
            raise ValueError(f"label: found {self.label!r} of {self.action}")


def record(output: Storage, decisions: Sequence[Decision], after: str = "") -> str:
    """Keep what was said at once; it is durable when this returns its file's path.

    It is said later than the file `after`, whatever the clocks of two machines say.
    """
    text = json.dumps([asdict(decision) for decision in decisions], ensure_ascii=False)
    path = f"{FOLDER}/{unique_name()}.json"
    if path <= after:
        path = _next_to(after) or path
    output.create(path, text.encode())
    return path


def _next_to(path: str) -> str | None:
    """A path of the next microsecond; None of one that is not named by a time."""
    stamp = path.removeprefix(f"{FOLDER}/").partition("-")[0]
    try:
        later = datetime.strptime(stamp, NAME_TIME) + timedelta(microseconds=1)
    except ValueError:
        return None
    return f"{FOLDER}/{unique_name(later)}.json"


def read_decisions(output: Storage) -> Iterator[Decision]:
    """Every decision, in the order in which they were said."""
    return chain.from_iterable(decisions for _, decisions in read_files(output, list_files(output)))


def list_files(output: Storage) -> list[str]:
    """The files of decisions, in the order in which they were said."""
    return [info.path for info in output.find(FOLDER) if info.path.endswith(".json")]


def read_files(output: Storage, paths: Sequence[str]) -> Iterator[tuple[str, list[Decision]]]:
    """Some files of decisions with what they say. Raises OutputError for one that is damaged."""
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for path, data in zip(paths, pool.map(output.read_bytes, paths), strict=True):
            yield path, _parsed(output, path, data)


def standing(output: Storage) -> dict[str, Decision]:
    """What holds now, by image: the last decision that was not undone."""
    return hold(read_decisions(output))


def hold(decisions: Iterable[Decision]) -> dict[str, Decision]:
    """What holds of decisions in their order."""
    said: dict[str, list[Decision]] = defaultdict(list)
    undone: set[tuple[str, str]] = set()
    for decision in decisions:
        if decision.action != "undo":
            said[decision.image_id].append(decision)
        elif decision.undoes:
            undone.add((decision.image_id, decision.undoes))
        elif said[decision.image_id]:
            said[decision.image_id].pop()
    left = ((name, [it for it in all_of if (name, it.id) not in undone]) for name, all_of in said.items())
    return {image_id: decisions[-1] for image_id, decisions in left if decisions}


def _parsed(output: Storage, path: str, data: bytes) -> list[Decision]:
    names = [field.name for field in fields(Decision)]
    older = dict.fromkeys(_NEWER, "")
    try:
        values: list[dict[str, Any]] = json.loads(data)
        return [Decision(**{name: (older | value)[name] for name in names}) for value in values]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{output.url(path)}: not a record of reviews ({error!r}); restore the file, or delete it to "
            "go on without what it says"
        ) from error
