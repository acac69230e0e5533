"""The house: a room imports only rooms below it, and what is never done is done nowhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "cvt_model": {"pipeline", "jobs", "ray", "pyarrow", "fsspec", "faiss"},
    "pipeline": {"jobs", "typer", "argparse", "click"},
    "jobs": {"ray", "faiss", "pyarrow", "fsspec", "torch"},
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Every module that is imported anywhere, in functions too, and by importlib's name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            first = node.args[0]
            start = first.values[0] if isinstance(first, ast.JoinedStr) else first
            if isinstance(start, ast.Constant):
                yield str(start.value)


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path.read_text())}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def opens_file_systems(source: str) -> bool:
    """Whether a module opens a file system itself, or reaches for one by fsspec's functions."""
    allowed = {"fsspec.utils", "fsspec.utils.glob_translate"}
    clients = ("fsspec", "s3fs", "gcsfs", "adlfs", "botocore", "pyarrow.fs")
    if any(name.startswith(clients) and name not in allowed for name in imports(source)):
        return True
    banned = {"url_to_fs", "get_filesystem_class", "from_uri"}
    attributes = (node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    return bool(banned & set(attributes))


def test_every_room_has_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)


def test_the_check_sees_imports_wherever_they_stand() -> None:
    source = "def f():\n    if x:\n        import a.b\n    from c import d\nimport_module('e')"
    assert set(imports(source)) == {"a.b", "c", "c.d", "e"}
    assert opens_file_systems("def f():\n    from fsspec.core import url_to_fs")
    assert opens_file_systems("from pyarrow import fs")
    assert not opens_file_systems("from fsspec.utils import glob_translate")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert not packages(path) & ROOMS[room]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "jobs"], ids=name_of)
def test_jobs_know_the_pipeline_and_not_the_model(path: Path) -> None:
    assert "cvt_model" not in packages(path)


def test_only_the_cluster_and_the_graph_import_ray() -> None:
    found = [name_of(path) for path in FILES if "ray" in packages(path)]
    training = ["pipeline/finetune/batches.py", "pipeline/finetune/fit.py"]
    assert found == ["pipeline/back_pressure.py", "pipeline/cluster.py", *training, "pipeline/run.py"]


def test_only_storage_opens_file_systems() -> None:
    sources = {name_of(path): path.read_text() for path in FILES}
    assert [name for name, source in sources.items() if opens_file_systems(source)] == [
        "pipeline/filesystems.py"
    ]
    users = {name for name, source in sources.items() if "pipeline.filesystems" in imports(source)}
    assert users == {"pipeline/storage.py", "pipeline/remote_folder.py"}


def handlers(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            yield ast.unparse(node.type) if node.type else "bare"


def test_only_the_image_decoder_catches_every_exception() -> None:
    found = {name_of(path) for path in FILES for kind in handlers(path) if kind in ("Exception", "bare")}
    assert found <= {"cvt_model/image_file.py"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled_and_nothing_is_loaded_by_halves(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            loads_weights = ast.unparse(node.func) == "torch.load"
            assert keywords.get("weights_only") == ("True" if loads_weights else None)
            assert keywords.get("allow_pickle", "False") == "False"
            assert keywords.get("strict") != "False"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", "pickle is known for the name of its error alone"
