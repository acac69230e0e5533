"""Every kind of remote storage answers alike: the real clients against servers on this machine."""

from __future__ import annotations

import base64
import importlib.util
import io
import socket
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from pipeline import filesystems
from pipeline.errors import ConfigError, StorageError
from pipeline.filesystems import open_filesystem, same_service
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


@pytest.mark.parametrize("size_bytes", [0, 8 * 2**20])
def test_a_server_that_takes_no_upload_to_its_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    monkeypatch.setattr(filesystems, "UPLOAD_S", 0.5)
    monkeypatch.setattr(filesystems, "UPLOAD_BYTES_PER_S", 2**30)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = {"key": "k", "secret": "s", "endpoint_url": endpoint}
        storage = Storage("s3://bucket/out", options, patience_s=0.1)
        with pytest.raises(
            StorageError, match=rf"out/x \(endpoint {endpoint}\): {size_bytes:,} bytes were"
        ):
            storage.write_bytes("x", bytes(size_bytes))
        with pytest.raises(StorageError, match="bytes were not taken within"):
            storage.create("x", bytes(size_bytes))


def test_clients_have_bounds_which_a_users_options_override() -> None:
    fs, path = open_filesystem(
        "s3://bucket/x", {"config_kwargs": {"read_timeout": 5, "tcp_keepalive": True}}
    )
    assert path == "bucket/x"
    assert fs.config_kwargs["read_timeout"] == 5
    assert fs.config_kwargs["tcp_keepalive"] is True
    assert fs.config_kwargs["connect_timeout"] == filesystems.CONNECT_S
    assert fs.config_kwargs["retries"]["total_max_attempts"] == filesystems.REQUEST_ATTEMPTS
    assert fs.retries == 1
    web, _ = open_filesystem("https://host/x")
    assert web.client_kwargs["timeout"].sock_read == filesystems.READ_S
    assert {fs.dircache.use_listings_cache, web.dircache.use_listings_cache} == {False}


@pytest.mark.parametrize(
    ("uri", "options", "endpoint"),
    [
        ("/data/x", {}, ""),
        ("s3://bucket/x", {"endpoint_url": "http://host:1"}, "http://host:1"),
        ("s3://bucket/x", {"client_kwargs": {"endpoint_url": "http://host:2"}}, "http://host:2"),
        ("s3://bucket/x", {}, "http://of-environment:3"),
        ("https://user:password@host:4/x", {}, "host:4"),
    ],
)
def test_messages_name_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, uri: str, options: dict[str, Any], endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://of-environment:3")
    assert Storage(uri, options).endpoint == endpoint


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("s3://a/x", "s3a://b/y", True),
        ("gs://a/x", "gcs://b/y", True),
        ("az://a/x", "abfss://b/y", True),
        ("https://host/x", "http://host:8080/y", True),
        ("https://host/x", "https://other/x", False),
        ("s3://a/x", "gs://a/x", False),
        ("/data", "file:///data", True),
        ("/data", "s3://data", False),
    ],
)
def test_options_are_for_one_service(one: str, other: str, same: bool) -> None:
    assert same_service(one, other) == same_service(other, one) == same


def test_a_client_that_is_not_installed_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"gs://b/x: no support .* pip install 'cvt-pipeline\[gcs\]'"):
        open_filesystem("gs://b/x")


def test_options_that_a_client_does_not_take_are_told_without_their_values() -> None:
    with pytest.raises(ConfigError, match="check the URI and its storage_options") as raised:
        Storage("s3://bucket", {"config_kwargs": {"no_such_key": "s3cret-0123"}}).check_reachable()
    assert "no_such_key" in str(raised.value)
    assert "s3cret-0123" not in str(raised.value)
