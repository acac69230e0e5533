"""A training's state as files: whole or absent, whatever happens while they are written.

`checkpoints/step-<n>.safetensors` holds all that a training needs to go on as if nothing had happened;
`checkpoints/best.safetensors` the weights that did best, with what they said of the validation images;
`checkpoints/interpolated.safetensors` the same of the best mixture with the weights it began with.
Tensors are in safetensors and the rest is JSON in its header: nothing is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cvt_model.save import write_weights
from pipeline.errors import OutputError
from pipeline.storage import FileInfo, Storage

FOLDER = "checkpoints"
BEST = f"{FOLDER}/best.safetensors"
INTERPOLATED = f"{FOLDER}/interpolated.safetensors"
KEPT = 2  # the newest, and one in case it is not readable
_FACTS = "cvt-pipeline"
Tensors = dict[str, Tensor]


@dataclass
class Sums:
    """What the steps since the last evaluation add up to."""

    loss: float = 0.0
    correct: float = 0.0
    images: int = 0
    seconds: float = 0.0


@dataclass
class Progress:
    """Where a training stands, beside its tensors."""

    digest: str  # of all that settles its course
    step: int = 0  # steps done
    best_step: int = 0
    best_accuracy: float = -1.0
    finished: bool = False
    seconds: float = 0.0  # of work, over all runs
    sums: Sums = field(default_factory=Sums)
    history: list[dict[str, float]] = field(default_factory=list)  # a row for each evaluation
    recipe: str = ""  # digest of what is known of it before an image is read; an earlier version's is not

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Progress:
        values = json.loads(text)
        return cls(**{**values, "sums": Sums(**values["sums"])})


def write_state(output: Storage, progress: Progress, tensors: Tensors) -> None:
    """Put the state in place, whole; older ones go."""
    _write(output, f"{FOLDER}/step-{progress.step:09d}.safetensors", progress.to_json(), tensors)
    for older in _states(output)[:-KEPT]:
        output.delete(older.path)


def check_state(output: Storage, recipe: str, digest: str = "") -> None:
    """Raise OutputError where the newest state is another training's, as far as it is known what ours is.

    Reads the beginning of a file alone.
    """
    progress = _newest_progress(output)
    if progress and (progress.recipe not in ("", recipe) or digest not in ("", progress.digest)):
        raise _another_training(output)


def read_state(output: Storage, digest: str) -> tuple[Progress, Tensors] | None:
    """The newest state that is whole; None where there is none.

    Raises OutputError where the states are another training's.
    """
    for file in reversed(_states(output)):
        try:
            facts, tensors = _read(output, file.path)
        except SafetensorError:  # a disk that lost what it had promised to keep
            continue
        progress = Progress.from_json(facts)
        if progress.digest != digest:
            raise _another_training(output)
        return progress, tensors
    return None


def write_best(
    output: Storage, facts: dict[str, Any], weights: Tensors, said: Tensors, path: str = BEST
) -> None:
    """Keep these weights as the best, with what is to be known of them and what they said."""
    tensors = {**prefixed("model/", weights), **prefixed("said/", said)}
    _write(output, path, json.dumps(facts), tensors)


def read_best(output: Storage, path: str = BEST) -> tuple[dict[str, Any], Tensors, Tensors]:
    """What is to be known of the best weights, they themselves, and what they said."""
    facts, tensors = _read(output, path)
    return json.loads(facts), without_prefix("model/", tensors), without_prefix("said/", tensors)


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors under names that begin with `prefix`."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    chosen = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in chosen.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """What an optimizer remembers, by the number of the parameter and a name."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Give an optimizer its memory back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _states(output: Storage) -> list[FileInfo]:
    return [file for file in output.find(FOLDER) if file.path.startswith(f"{FOLDER}/step-")]


def _newest_progress(output: Storage) -> Progress | None:
    """What the newest state with a readable header tells; None where there is none."""
    for file in reversed(_states(output)):
        num_bytes = min(file.size, int.from_bytes(output.read_range(file.path, 0, 8), "little"))
        try:
            header = json.loads(output.read_range(file.path, 8, num_bytes))
            return Progress.from_json(header["__metadata__"][_FACTS])
        except (ValueError, KeyError, TypeError):  # as in `read_state`
            continue
    return None


def _another_training(output: Storage) -> OutputError:
    return OutputError(
        f"output.uri: {output.uri} holds another training (other images, network, recipe or seed); "
        "choose another output, or delete this one to begin anew"
    )


def _write(output: Storage, path: str, facts: str, tensors: Tensors) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with output.replacing(path) as local:
        write_weights(local, tensors, {_FACTS: facts})


def _read(output: Storage, path: str) -> tuple[str, Tensors]:
    with output.local_copy(path) as local, safe_open(local, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return file.metadata()[_FACTS], tensors
