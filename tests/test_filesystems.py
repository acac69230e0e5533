"""Every kind of remote storage answers alike: the real clients against servers on this machine."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Iterator

import pytest

from pipeline.storage import Storage
from tests.fake_stores import BUCKET, LOST, MODIFIED, AzureHandler, GoogleHandler, Store, serving


def google(store: Store) -> Storage:
    return Storage(f"gs://{BUCKET}/out", {"endpoint_url": store.endpoint, "token": "anon", "project": "p"})


def azure(store: Store) -> Storage:
    key = base64.b64encode(b"an-account-key-of-nobody").decode()
    account = f"AccountName=account;AccountKey={key};BlobEndpoint={store.endpoint}/account;"
    return Storage(f"az://{BUCKET}/out", {"connection_string": f"DefaultEndpointsProtocol=http;{account}"})


KINDS = {"google": (GoogleHandler, google, "gcsfs"), "azure": (AzureHandler, azure, "adlfs")}


@pytest.fixture(params=KINDS)
def remote(request: pytest.FixtureRequest) -> Iterator[tuple[Storage, Store]]:
    handler, open_storage, package = KINDS[request.param]
    if importlib.util.find_spec(package) is None:  # not imported: storage.py says how gcsfs begins
        pytest.skip(f"{package} is not installed")
    with serving(handler) as store:
        yield open_storage(store), store


def test_what_is_written_is_listed_read_moved_and_deleted(remote: tuple[Storage, Store]) -> None:
    storage, store = remote
    assert storage.find() == []
    storage.write_bytes("a/x", b"0123456789" * 10)
    storage.write_bytes("b", b"")
    assert [(info.path, info.size, info.modified) for info in storage.find()] == [
        ("a/x", 100, MODIFIED),
        ("b", 0, MODIFIED),
    ]
    assert storage.find("a") == [storage.info("a/x")]
    assert storage.read_bytes("a/x") == b"0123456789" * 10
    assert (storage.exists("a/x"), storage.exists("a/y"), storage.is_file("a/x")) == (True, False, True)
    assert storage.exists("a")
    assert not storage.is_file("a")
    storage.move("a/x", "c/y")
    assert [info.path for info in storage.find()] == ["b", "c/y"]
    storage.delete("b")
    storage.delete("b")
    storage.delete_folder("nothing")
    assert sorted(store.objects) == ["out/c/y"]


def test_a_new_version_is_told_from_the_old_one(remote: tuple[Storage, Store]) -> None:
    storage, _ = remote
    storage.write_bytes("x", b"1")
    first = storage.info("x")
    assert storage.find() == [first] == [storage.info("x")]
    storage.write_bytes("x", b"2")
    assert storage.info("x").version != first.version


def test_a_file_is_read_in_pieces_from_anywhere(remote: tuple[Storage, Store]) -> None:
    storage, _ = remote
    data = bytes(range(256)) * 40
    storage.write_bytes("x", data)
    with storage.open("x") as file:
        assert file.read(10) == data[:10]
        assert file.seek(-7, io.SEEK_END) == len(data) - 7
        assert file.read() == data[-7:]
        assert file.read(5) == b""
        file.seek(3)
        assert file.read(4) == data[3:7]
    with pytest.raises(FileNotFoundError):
        storage.open("y")


def test_only_the_first_creation_succeeds(remote: tuple[Storage, Store]) -> None:
    storage, store = remote
    storage.create("commits/x", b"first")
    with pytest.raises(FileExistsError):
        storage.create("commits/x", b"second")
    assert store.objects["out/commits/x"][0] == b"first"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_throttling_and_failing_servers_are_waited_for(remote: tuple[Storage, Store], status: int) -> None:
    storage, store = remote
    if storage.uri.startswith("az://"):
        patch_azure_pauses(storage)
    storage.write_bytes("x", b"data")
    store.trouble = [status]
    assert storage.read_bytes("x") == b"data"
    assert store.trouble == []


def test_a_creation_whose_answer_was_lost_is_known_as_ours(remote: tuple[Storage, Store]) -> None:
    storage, store = remote
    if storage.uri.startswith("az://"):
        patch_azure_pauses(storage)
    store.trouble = [LOST]
    storage.create("commits/x", b"ours")
    assert store.objects["out/commits/x"] == (b"ours", 1)
    with pytest.raises(FileExistsError):
        storage.create("commits/x", b"theirs")


def patch_azure_pauses(storage: Storage) -> None:
    """Azure's own retries begin after 15 s, which is no time for a test."""
    for policy in storage.fs.service_client._pipeline._impl_policies:
        if hasattr(policy, "initial_backoff"):
            policy.initial_backoff = policy.increment_base = policy.random_jitter_range = 0
