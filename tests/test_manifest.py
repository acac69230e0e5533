"""Manifests: rows name images by URI; what they name and carry arrives unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.manifest import Manifest, resolve_uri, unpack_metadata
from pipeline.shards import FileInfo, Listing, Member, Shard, Work
from pipeline.storage import Storage


def open_manifest(path: Path, image_column: str | None = None) -> Manifest:
    files = (FileInfo(path.name, path.stat().st_size, "1"),)
    return Manifest(Listing(Storage(str(path.parent)), "manifest", files), image_column)


def write(folder: Path, name: str, content: str | bytes | pa.Table) -> Path:
    path = folder / name
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def uris(path: Path, image_column: str | None = None) -> list[str]:
    return [member.path for member in open_manifest(path, image_column).members([])]


ROWS = [{"uri": "a.jpg", "n": 1}, {"uri": "b/ü #?%.jpg", "n": 2}, {"uri": "https://x/c.jpg", "n": 3}]


def in_every_format(folder: Path) -> list[Path]:
    csv = "uri,n\n" + "".join(f"{row['uri']},{row['n']}\n" for row in ROWS)
    jsonl = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = pa.Table.from_pylist(ROWS)
    return [
        write(folder, "m.csv", csv),
        write(folder, "m.jsonl", jsonl),
        write(folder, "m.ndjson", jsonl),
        write(folder, "m.parquet", table),
    ]


def test_every_format_gives_the_same_members_in_the_files_order(tmp_path: Path) -> None:
    for path in in_every_format(tmp_path):
        assert uris(path) == [row["uri"] for row in ROWS]


def test_the_uri_column_is_found_by_its_usual_names_or_named(tmp_path: Path) -> None:
    for name in ("uri", "url", "image_url", "path", "file_name", "image"):
        assert uris(write(tmp_path, "m.csv", f"x,{name}\n1,a.jpg\n")) == ["a.jpg"]
    path = write(tmp_path, "m.csv", "where,uri\nb.jpg,a.jpg\n")
    assert uris(path, "where") == ["b.jpg"]


def test_a_missing_uri_column_names_the_key_and_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "m.csv", "x,y\n1,2\n")
    with pytest.raises(InputError, match=r"input\.image_column: .*say which of x, y"):
        open_manifest(path)
    with pytest.raises(InputError, match=r"input\.image_column: .*no column z; it has x, y"):
        open_manifest(path, "z")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", ""),
        ("m.csv", "uri,n\na.jpg\n"),
        ("m.jsonl", ""),
        ("m.jsonl", "not json\n"),
        ("m.jsonl", '["a.jpg"]\n'),
        ("m.parquet", "PAR1"),
        ("m.csv", "uri,uri\na.jpg,b.jpg\n"),
        (
            "m.parquet",
            pa.table({"uri": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())}),
        ),
    ],
)
def test_a_manifest_that_cannot_be_read_is_an_input_error_that_names_it(
    tmp_path: Path, name: str, content: str | pa.Table
) -> None:
    with pytest.raises(InputError, match=name):
        uris(write(tmp_path, name, content))


def test_repeated_and_missing_uris_are_members_of_their_own(tmp_path: Path) -> None:
    rows = [{"uri": "a"}, {"uri": None}, {"uri": "a"}, {"uri": None}, {"uri": "a"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for path in (
        write(tmp_path, "m.jsonl", text),
        write(tmp_path, "m.parquet", pa.Table.from_pylist(rows)),
        write(tmp_path, "m.csv", 'uri,n\na,\n"",1\na,\n"",2\na,\n'),
    ):
        found = [(member.path, member.repeat) for member in open_manifest(path).members([])]
        assert found == [("a", 0), ("", 0), ("a", 1), ("", 1), ("a", 2)]


def test_a_uri_of_digits_stays_as_it_is_written(tmp_path: Path) -> None:
    assert uris(write(tmp_path, "m.csv", "uri,n\n0001,1\n0002,2\n")) == ["0001", "0002"]
    assert uris(write(tmp_path, "m.jsonl", '{"uri": "2024-01-01"}\n')) == ["2024-01-01"]


def test_one_uri_that_is_not_utf8_does_not_spoil_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, "m.csv", "uri,n\na.jpg,1\nb\xe9.jpg,2\n".encode("latin-1"))
    assert uris(path)[0] == "a.jpg"


def test_the_version_of_a_member_changes_with_the_metadata_that_is_carried_and_no_other(
    tmp_path: Path,
) -> None:
    def versions(text: str, *names: str) -> list[str]:
        manifest = open_manifest(write(tmp_path, "m.csv", text))
        fields = [manifest.metadata_schema.field(name) for name in names]
        return [member.version for member in manifest.members(fields)]

    before, after = "uri,n,o\na,1,1\nb,2,1\n", "uri,n,o\na,1,9\nb,3,9\n"
    assert versions(before) == versions(after)
    one, two = versions(before, "n"), versions(after, "n")
    assert one[0] == two[0]
    assert one[1] != two[1]


def test_metadata_keeps_its_types_and_finds_its_member(tmp_path: Path) -> None:
    table = pa.table(
        {
            "uri": ["a", "b", "a", None],
            "n": pa.array([1, 2, 3, None], pa.int16()),
            "tags": pa.array([["x"], None, [], ["y"]], pa.list_(pa.string())),
            "when": pa.array([0, 1, 2, 3], pa.timestamp("us", "UTC")),
        }
    )
    manifest = open_manifest(write(tmp_path, "m.parquet", table))
    fields = list(manifest.metadata_schema)
    assert [field.name for field in fields] == ["n", "tags", "when"]
    members = manifest.members(fields)
    group = (members[3], members[2], members[0], Member("deleted", 0, ""))
    shard = Shard("images-1", manifest.url, "manifest", members=group)
    work = manifest.attach(Work(shard, "s"), fields)
    rows = unpack_metadata(Work.from_json(work.to_json()).metadata, 4)
    expected = table.drop_columns("uri").to_pylist()
    assert rows[:3] == [expected[3], expected[2], expected[0]]
    assert set(rows[3].values()) == {None}


def test_without_metadata_nothing_travels(tmp_path: Path) -> None:
    manifest = open_manifest(write(tmp_path, "m.csv", "uri\na\n"))
    work = Work(Shard("images-1", manifest.url, "manifest", members=(Member("a", 0, ""),)), "s")
    assert manifest.attach(work, []) == work
    assert unpack_metadata("", 2) == [{}, {}]


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("a.jpg", "s3://bucket/lists/a.jpg"),
        ("x/#?.jpg", "s3://bucket/lists/x/#?.jpg"),
        ("https://host/a.jpg", "https://host/a.jpg"),
        ("/data/a.jpg", "/data/a.jpg"),
    ],
)
def test_relative_uris_start_from_the_manifests_folder(uri: str, resolved: str) -> None:
    assert resolve_uri("s3://bucket/lists/m.csv", uri) == resolved
