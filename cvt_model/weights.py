"""Weight files: which a directory holds, their names and shapes, their hash, their tensors.

What enters: a directory in the Hub's layout. What leaves: names, shapes, a SHA-256, tensors one by
one. It must not know what a network computes. torch is imported only where tensors are read.
"""

import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cvt_model.errors import CheckpointError
from cvt_model.presets import Preset

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

# In order of preference: safetensors cannot hold code and is read without copying it whole;
# TensorFlow's file has other names and axes.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
)
OPTIONAL_SUFFIX = ".num_batches_tracked"  # counts training steps; inference never reads it
FETCH_AGAIN = "copy or download the checkpoint again"
HASH_BLOCK_BYTES = 2**20
MAPPED_NUMBERS = 2**23  # 32 MiB of float32
BUILTIN_RECIPE = 1  # raise it when the way the built-in weights are drawn changes


def find_weight_files(directory: Path) -> tuple[Path, ...]:
    """The files that hold a checkpoint's weights, sorted by name; safetensors are preferred."""
    for name in WEIGHT_FILES:
        path = directory / name
        if path.is_file():
            return shards_of(path) if name.endswith(".index.json") else (path,)
    raise CheckpointError(
        f"{directory} holds no weights: none of {', '.join(WEIGHT_FILES)} is there; give a "
        "directory that save_pretrained wrote, or a complete copy of a Hub repository"
    )


def shards_of(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(
            f'{index}: "weight_map" must map every parameter to a file beside it; {FETCH_AGAIN}'
        )
    shards = tuple(index.parent / name for name in sorted(set(names)))
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {shortlist(missing)}, which {index.name} names; {FETCH_AGAIN}"
        )
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}; {FETCH_AGAIN}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def read_shapes(files: tuple[Path, ...]) -> Shapes:
    """Names and shapes of all tensors; of safetensors only the headers are read, without torch."""
    shapes: Shapes = {}
    for path in files:
        if path.suffix == ".safetensors":
            with open_safetensors(path, "numpy") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        else:
            tensors_by_name = tensors_of(path, load_pickle(path))
            shapes |= {key: tuple(tensor.shape) for key, tensor in tensors_by_name.items()}
    return shapes


def read_tensors(files: tuple[Path, ...]) -> Iterator[tuple[str, "Tensor"]]:
    """Every tensor by name, on the CPU, in the files' dtype; each may be a view of its file.

    Pages of a mapped file that were read count as memory of this process until the map is closed:
    a safetensors file is therefore mapped anew after every MAPPED_NUMBERS. Keep copies, not views.
    """
    for path in files:
        if path.suffix == ".safetensors":
            for keys in groups_of_keys(path):
                with open_safetensors(path, "pt") as tensors:
                    for key in keys:
                        yield key, tensors.get_tensor(key)
        else:
            yield from tensors_of(path, load_pickle(path)).items()


def groups_of_keys(path: Path) -> list[list[str]]:
    """The names in a safetensors file, in groups of about MAPPED_NUMBERS."""
    groups: list[list[str]] = [[]]
    numbers = 0
    for key, shape in read_shapes((path,)).items():
        groups[-1].append(key)
        numbers += math.prod(shape)
        if numbers >= MAPPED_NUMBERS:
            groups.append([])
            numbers = 0
    return groups


def open_safetensors(path: Path, framework: str) -> Any:
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {error}; {FETCH_AGAIN}"
        ) from error


def load_pickle(path: Path) -> Any:
    """What a `torch.save` file holds; code in it is refused, never run."""
    import torch

    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        mmap = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no plain file of tensors: it is damaged, or holds Python objects that "
            "could run code, which are never loaded; convert it to model.safetensors where you "
            "trust it, or get it again from its publisher"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a complete PyTorch file: {reason}; {FETCH_AGAIN}") from error


def tensors_of(path: Path, state: Any) -> dict[str, "Tensor"]:
    """A pickle's content, where it is tensors by name and nothing else."""
    import torch

    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise CheckpointError(
            f"{path} holds more than tensors by name; save the model's state_dict() alone"
        )
    return state


def hash_files(files: tuple[Path, ...]) -> str:
    """SHA-256 over the names and contents of `files`, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def hash_preset(preset: Preset) -> str:
    """SHA-256 of what determines a built-in model's weights."""
    recipe = {
        "config": preset.config.to_dict(),
        "seed": preset.seed,
        "recipe": BUILTIN_RECIPE,
    }
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def draw_weights(preset: Preset) -> Iterator[tuple[str, "Tensor"]]:
    """A built-in model's tensors by name: equal bit for bit on every machine.

    Weights are uniform with the standard deviation of the reference's initialisation: unlike the
    normal distribution, whose logarithms and cosines differ between CPUs in the last bit, a
    uniform draw takes one exact subtraction and one rounding.
    """
    import torch

    from cvt_model.model import CvtForImageClassification

    with torch.device("meta"):
        shapes_of = CvtForImageClassification(preset.config).state_dict()
    generator = torch.Generator("cpu").manual_seed(preset.seed)
    half_width = preset.config.initializer_range * 3**0.5
    for key, tensor in shapes_of.items():
        if key.endswith(OPTIONAL_SUFFIX):
            yield key, torch.zeros((), dtype=torch.long)
        elif tensor.ndim > 1:
            uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
            yield key, (uniform - 0.5) * (2 * half_width)
        elif key.endswith((".weight", ".running_var")):  # of the norms
            yield key, torch.ones(tensor.shape)
        else:
            yield key, torch.zeros(tensor.shape)


def shortlist(items: list[str], limit: int = 8) -> str:
    """The first `limit` items and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
