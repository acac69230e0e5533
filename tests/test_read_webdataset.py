"""WebDataset archives: every sample of a sound archive, and nothing of one that is not whole."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.readers import read_shard
from tests.shard_files import (
    Read,
    TarEntry,
    edit_bytes,
    file_work,
    options_for,
    read_file,
    write_tar,
)

TEXTS = (pa.field("txt", pa.string()), pa.field("json", pa.string()))
BLOCK = 512


def read(path: Path, **changes: object) -> Read:
    return read_file(path, "webdataset", **changes)


def read_entries(folder: Path, *entries: TarEntry, **changes: object) -> Read:
    return read(write_tar(folder / "x.tar", entries), **changes)


def texts(result: Read) -> dict[str, str | None]:
    """The text of each row once the amendments are applied, by the key that it then has."""
    later = {row["amended_key"]: row for row in result.amendments}
    found = {}
    for row in result.rows:
        change = later.get(row["key"], {})
        found[change.get("key") or row["key"]] = change.get("txt") or row["txt"]
    return found


# Archives and keys


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz")])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_images_are_read_in_order_from_every_kind_of_tar(
    tmp_path: Path, name: str, mode: str, kind: int
) -> None:
    entries = [(f"train/{n}.jpg", bytes([n]) * (n * 100)) for n in range(10)]
    result = read(write_tar(tmp_path / name, entries, mode, format=kind))
    assert result.error is None
    assert result.rejects == []
    assert [(row["key"], row["data"]) for row in result.rows] == [
        (f"train/{n}", bytes([n]) * (n * 100)) for n in range(10)
    ]
    assert result.rows[3]["image_id"] == f"{name}#train/3"
    assert result.rows[3]["shard"] == name


def test_a_key_ends_at_the_first_dot_of_the_file_name(tmp_path: Path) -> None:
    names = ["./a.jpg", "v1.0/b.jpg", "c.v2.png", "D.JPG", "v1.0/b.x/c.jpg"]
    result = read_entries(tmp_path, *((name, b"x") for name in names))
    assert result.keys == ["a", "v1.0/b", "c", "D", "v1.0/b.x/c"]


def test_members_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in (".hidden", "folder.jpg/._apple.jpg", "noextension"):
            archive.addfile(tarfile.TarInfo(name))
    result = read(path)
    assert result.error is None
    assert result.num_samples == 0


def test_names_that_are_not_ascii_or_long_keep_their_bytes(tmp_path: Path) -> None:
    names = ["ü.jpg", "日本/写真.jpg", "x" * 300 + ".jpg", "new\nline #?%.jpg", os.fsdecode(b"\xff.jpg")]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        entries = [(name, b"x") for name in names]
        result = read(write_tar(tmp_path / "x.tar", entries, format=kind))
        assert result.keys == ["ü", "日本/写真", "x" * 300, "new\nline #?%", "\\xff"]


def test_a_link_is_a_reject_and_the_file_it_leads_to_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
        for name, kind in (("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.jpg"
            archive.addfile(link)
    result = read(path)
    assert result.keys == ["a"]
    assert result.reasons == {"b": "unreadable", "c": "unreadable"}


def test_an_image_over_the_limit_is_a_reject_and_the_next_is_read(tmp_path: Path) -> None:
    entries = [("a.jpg", b"x" * 11), ("b.jpg", b"x" * 10), ("c.jpg", b"")]
    result = read_entries(tmp_path, *entries, max_image_bytes=10)
    assert result.keys == ["b", "c"]
    assert result.reasons == {"a": "too_large"}
    assert result.rejects[0]["size_bytes"] == 11


@pytest.mark.parametrize("kind", ["gnu", "posix"])
def test_sparse_members_are_read_with_their_holes(tmp_path: Path, kind: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        with (tmp_path / name).open("wb") as file:
            for hole in range(40):
                file.seek(hole * 20_000)
                file.write(b"data" + name.encode())
            file.truncate(1_000_000)
    subprocess.run(
        ["tar", "--sparse", f"--format={kind}", "-cf", "x.tar", "a.jpg", "b.jpg"], cwd=tmp_path, check=True
    )
    assert (tmp_path / "x.tar").stat().st_size < 1_000_000, "this tar wrote no sparse members"
    result = read(tmp_path / "x.tar")
    assert result.error is None
    assert {f"{row['key']}.jpg": row["data"] for row in result.rows} == {
        name: (tmp_path / name).read_bytes() for name in ("a.jpg", "b.jpg")
    }


# Several members of one key


@pytest.mark.parametrize(
    "order",
    [
        ["a.txt", "a.jpg", "b.txt", "b.jpg"],
        ["a.jpg", "a.txt", "b.jpg", "b.txt"],
        ["a.txt", "b.txt", "a.jpg", "b.jpg"],
        ["a.jpg", "b.jpg", "a.txt", "b.txt"],
        ["a.jpg", "b.txt", "a.txt", "b.jpg"],
    ],
)
def test_metadata_joins_its_image_wherever_it_stands(tmp_path: Path, order: list[str]) -> None:
    entries = [(name, f"of {name[0]}".encode()) for name in order]
    result = read_entries(tmp_path, *entries, metadata=TEXTS)
    assert texts(result) == {"a": "of a", "b": "of b"}
    assert result.rejects == []


def test_metadata_that_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    result = read_entries(tmp_path, ("a.txt", b"t"), ("a.jpg", b"x"), ("a.json", b"{}"))
    assert set(result.rows[0]) == {"image_id", "shard", "key", "data"}
    assert result.amendments == []


def test_metadata_that_is_not_utf8_keeps_its_bytes_as_escapes(tmp_path: Path) -> None:
    result = read_entries(tmp_path, ("a.txt", b"\xffx"), ("a.jpg", b"x"), metadata=TEXTS)
    assert result.rows[0]["txt"] == "\\xffx"


@pytest.mark.parametrize(
    "order",
    [
        ["a.jpg", "a.png", "b.jpg"],
        ["a.jpg", "b.jpg", "a.png"],
        ["b.jpg", "a.png", "a.jpg"],
        ["a.png", "b.jpg", "a.jpg"],
    ],
)
def test_several_images_of_a_key_bear_their_extensions_wherever_they_stand(
    tmp_path: Path, order: list[str]
) -> None:
    result = read_entries(tmp_path, *((name, name.encode()) for name in order))
    later = {row["amended_key"]: row for row in result.amendments}
    found = {row["data"].decode(): later.get(row["key"], row) for row in result.rows}
    assert {name: (row["key"], row["image_id"]) for name, row in found.items()} == {
        "a.jpg": ("a.jpg", "x.tar#a.jpg"),
        "a.png": ("a.png", "x.tar#a.png"),
        "b.jpg": ("b", "x.tar#b"),
    }


@pytest.mark.parametrize(
    "order",
    [
        ["a.txt", "a.jpg", "a.png", "b.jpg"],
        ["a.jpg", "b.jpg", "a.png", "b.txt", "a.txt"],
        ["a.jpg", "b.jpg", "a.txt", "b.txt", "a.png"],
        ["a.jpg", "a.txt", "b.jpg", "a.png"],
        ["a.txt", "b.jpg", "a.jpg", "b.txt", "a.png"],
    ],
)
def test_metadata_of_a_key_with_several_images_joins_them_all(tmp_path: Path, order: list[str]) -> None:
    result = read_entries(tmp_path, *((name, name[0].encode()) for name in order), metadata=TEXTS)
    found = texts(result)
    assert {key: found[key] for key in ("a.jpg", "a.png")} == {"a.jpg": "a", "a.png": "a"}


def test_the_second_image_of_one_name_is_a_duplicate(tmp_path: Path) -> None:
    entries = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("b.JPG", b"4")]
    result = read_entries(tmp_path, *entries)
    assert [row["data"] for row in result.rows] == [b"1", b"2"]
    assert [(row["image_id"], row["reason"]) for row in result.rejects] == [
        ("x.tar#a", "duplicate_id"),
        ("x.tar#b", "duplicate_id"),
    ]


def test_keys_without_an_image_are_rejects_in_the_archives_order(tmp_path: Path) -> None:
    names = [f"{n:02d}.txt" for n in range(30)]
    entries = [("x.jpg", b"x"), *((name, b"") for name in names)]
    result = read_entries(tmp_path, *entries, chunk_images=7)
    assert result.keys == ["x"]
    assert [row["key"] for row in result.rejects] == [name[:2] for name in names]
    assert set(result.reasons.values()) == {"no_image"}


# Archives that are not whole


def small_tar(folder: Path, kind: int = tarfile.PAX_FORMAT) -> tuple[Path, int, int]:
    """A tar, its samples, and where its last member ends."""
    entries = [
        ("a.jpg", b"1" * 700),
        ("x" * 120 + ".jpg", b"2" * 512),
        ("b.bin", b"3" * 1000),
        ("ü.jpg", b"4" * 10),
        ("empty.jpg", b""),
        ("last.jpg", b"5" * 1024),
    ]
    path = write_tar(folder / "x.tar", entries, format=kind)
    return path, len(entries), len(path.read_bytes().rstrip(b"\0"))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_fails_and_never_loses_a_sample_silently(tmp_path: Path, kind: int) -> None:
    path, num_samples, end = small_tar(tmp_path, kind)
    whole = path.read_bytes()
    assert read(path).num_samples == num_samples
    cuts = {0, 1, *range(0, end + 3 * BLOCK, BLOCK), *range(100, end + 2 * BLOCK, 333), end, end + 1}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        result = read(path)
        if cut < end + BLOCK:
            assert result.error, f"cut at {cut}: not noticed"
        else:
            assert result.num_samples == num_samples


def test_a_damaged_byte_in_any_header_fails_the_archive(tmp_path: Path) -> None:
    path, _, _ = small_tar(tmp_path, tarfile.GNU_FORMAT)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        offsets = [member.offset for member in archive]
    for offset in offsets:
        for position in (0, 124, 148, 156, 257, 511):
            path.write_bytes(whole)
            edit_bytes(path, lambda data, at=offset + position: data.__setitem__(at, data[at] ^ 0x55))
            assert read(path).error, f"header at {offset}, byte {position}: not noticed"
        path.write_bytes(whole[:offset] + b"\0" * BLOCK + whole[offset + BLOCK :])
        assert read(path).error, f"header at {offset} zeroed: not noticed"


def test_a_tar_without_its_end_mark_fails_and_says_where(tmp_path: Path) -> None:
    path, _, end = small_tar(tmp_path)
    path.write_bytes(path.read_bytes()[:end])
    assert "end-of-archive mark is missing" in (read(path).error or "")


def test_tars_joined_by_cat_fail_and_those_joined_by_tar_do_not(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", [("a.jpg", b"x")])
    write_tar(tmp_path / "2.tar", [("b.jpg", b"x")])
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + (tmp_path / "2.tar").read_bytes())
    assert "tar --concatenate" in (read(both).error or "")
    subprocess.run(["tar", "--concatenate", "-f", "1.tar", "2.tar"], cwd=tmp_path, check=True)
    assert read(one).keys == ["a", "b"]


@pytest.mark.parametrize("data", [b"", b"x", b"no tar\n" * 200, b"\x1f\x8b", b"PK\3\4" * 200])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_a_file_that_is_no_tar_fails(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name).error


def test_a_tar_that_is_gone_fails(tmp_path: Path) -> None:
    work = file_work(write_tar(tmp_path / "x.tar", []), "webdataset")
    (tmp_path / "x.tar").unlink()
    (chunk,) = read_shard(work, options_for())
    assert "x.tar" in chunk.column("error")[0].as_py()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_empty_tar_has_no_samples_and_is_no_error(tmp_path: Path, mode: str) -> None:
    result = read(write_tar(tmp_path / ("x.tar" if mode == "w" else "x.tgz"), [], mode))
    assert result.error is None
    assert result.num_samples == 0
    assert result.chunks[-1].column("num_chunks")[0].as_py() == 1


def test_a_gzipped_tar_that_is_cut_or_damaged_fails(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tgz", [(f"{n}.jpg", os.urandom(600)) for n in range(5)], "w:gz")
    whole = path.read_bytes()
    for cut in (1, 9, 10, 100, len(whole) // 2, len(whole) - 9, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read(path).error, f"cut at {cut}: not noticed"
    for position in (len(whole) - 8, len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole)
        edit_bytes(path, lambda data, at=position: data.__setitem__(at, data[at] ^ 1))
        assert read(path).error, f"damage at {position}: not noticed"


def test_a_gzip_of_several_parts_is_read_whole(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", b"x" * 600) for n in range(5)]).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data[:1234]) + gzip.compress(data[1234:]))
    assert read(tmp_path / "x.tar.gz").keys == ["0", "1", "2", "3", "4"]


def pax_tar(folder: Path, **headers: str) -> Path:
    """A tar whose second member has these extended headers."""
    path = folder / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.jpg", "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 4
            if name == "b.jpg":
                info.pax_headers = headers
            archive.addfile(info, io.BytesIO(b"data"))
    return path


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"GNU.sparse.map": "x,y"},
        {"GNU.sparse.map": "1", "GNU.sparse.size": "z"},
        {"GNU.sparse.realsize": "z"},
        {"size": "-5"},
        {"size": "99999999999999999999999"},
    ],
)
def test_nonsense_in_extended_headers_fails_the_archive_and_nothing_more(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    assert read(pax_tar(tmp_path, **headers)).error


def header(name: bytes, size: bytes, kind: bytes, tail: dict[int, bytes] | None = None) -> bytes:
    """A tar header with a valid checksum and whatever else."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    block[0:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), size.ljust(12, b"\0"), kind
    for position, data in (tail or {}).items():
        block[position : position + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "data",
    [
        header(b"a.jpg", b"0", b"S", {482: b"\1"}),  # its map goes on in a block that is not there
        header(b"a.jpg", b"\x80" + b"\xff" * 11, b"0"),
        header(b"a.txt", b"\x80" + b"\xff" * 11, b"0"),
        header(b"long", b"\x80" + b"\xff" * 11, b"L"),
        header(b"pax", b"\x80" + b"\xff" * 11, b"x"),
        header(b"a.jpg", b"\xff" * 12, b"0") + b"\0" * 1024,
        header(b"long", b"00000001000", b"L") + b"x" * 512,
        (header(b"long", b"0", b"L")) * 2000,
    ],
    ids=["sparse", "size", "text-size", "long-size", "pax-size", "negative", "long-cut", "nested"],
)
def test_hostile_headers_fail_the_archive_and_nothing_more(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    result = read(tmp_path / "x.tar", metadata=TEXTS)
    assert result.error or result.num_samples == 1


@pytest.mark.parametrize("num_blocks", [4, 5])
def test_a_cut_in_the_map_of_a_sparse_member_fails_the_archive_and_does_not_hang(
    tmp_path: Path, num_blocks: int
) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        for hole in range(200):
            file.seek(hole * 20_000)
            file.write(b"data")
    command = ["tar", "--sparse", "--format=posix", "-cf", "x.tar", "a.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[: num_blocks * BLOCK])
    command = [sys.executable, "-c", READ_ONE, str(tmp_path / "x.tar")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-300:]
    assert "not readable to its end" in done.stdout


READ_ONE = """
import sys, pathlib
from tests.shard_files import read_file
print(read_file(pathlib.Path(sys.argv[1]), "webdataset").error)
"""


# Memory


def peak_mb() -> float:
    """The most memory that this process ever held, since it was last told to forget."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def test_an_archive_of_any_size_passes_through_bounded_memory(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        data = os.urandom(3_000_000)
        for number in range(100):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    work = file_work(tmp_path / "x.tar", "webdataset")
    Path("/proc/self/clear_refs").write_text("5")
    before, num_rows = peak_mb(), 0
    for chunk in read_shard(work, options_for(chunk_images=8)):
        rows = schema.unpack(chunk.column("rows")[0])
        num_rows += rows.num_rows
        assert sum(map(len, rows.column("data").to_pylist())) <= 8 * len(data)
    assert num_rows == 100
    assert peak_mb() - before < 200
    (tmp_path / "x.tar").unlink()


def test_a_chunk_is_handed_on_before_it_grows_over_32_mb(tmp_path: Path) -> None:
    entries = [(f"{n}.jpg", b"x" * 10_000_000) for n in range(8)]
    path = write_tar(tmp_path / "x.tar", entries)
    sizes = [
        schema.unpack(chunk.column("rows")[0]).num_rows
        for chunk in read_shard(file_work(path, "webdataset"), options_for(chunk_images=1000))
    ]
    assert sizes == [3, 3, 2]
