"""Failures that pass are waited for, for a bounded time; all others are told at once."""

from __future__ import annotations

import errno
import io
import socket
import threading
from collections.abc import Callable
from typing import Any

import aiohttp
import botocore.exceptions
import pytest

from pipeline import retry
from pipeline.errors import ConfigError, StorageError
from pipeline.remote_file import RemoteFile
from pipeline.retry import check_reachable, is_transient, pause_s, with_retries
from pipeline.storage import storage_failures


def answered(code: str, status: int) -> OSError:
    """What s3fs makes of an answer of S3."""
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = OSError(errno.EBUSY, "as s3fs tells it")
    error.__cause__ = botocore.exceptions.ClientError(response, "GetObject")
    return error


class GoogleError(Exception):
    """As gcsfs's HttpError."""

    def __init__(self, code: int | str) -> None:
        super().__init__(str(code))
        self.code = code


class AzureError(Exception):
    """As azure's HttpResponseError."""

    def __init__(self, status_code: int, error_code: str = "") -> None:
        super().__init__(error_code)
        self.status_code, self.error_code = status_code, error_code


class FileExpired(OSError):  # noqa: N818 - s3fs's name for it
    """As s3fs tells of a file that was replaced while it was read."""


PASSING = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    TimeoutError(),
    OSError(errno.ETIMEDOUT, "timed out"),
    socket.gaierror(socket.EAI_AGAIN, "try again"),
    answered("SlowDown", 503),
    answered("InternalError", 500),
    answered("RequestTimeout", 400),
    answered("ConditionalRequestConflict", 409),
    answered("429", 429),
    GoogleError(429),
    GoogleError("503"),
    AzureError(503, "ServerBusy"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
    botocore.exceptions.ConnectTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("cut short"),
]
LASTING = [
    FileNotFoundError(errno.ENOENT, "no such file"),
    PermissionError("Access Denied"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "a broken disk"),
    FileExpired(errno.EBUSY, "replaced meanwhile"),
    answered("AccessDenied", 403),
    answered("NoSuchBucket", 404),
    answered("PreconditionFailed", 412),
    GoogleError(403),
    AzureError(401, "AuthenticationFailed"),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.SSLError(endpoint_url="https://x", error="certificate verify failed"),
    StorageError("it was waited for already"),
]


def named(error: Exception) -> str:
    return f"{type(error).__name__} {error.__cause__ or error}"


@pytest.mark.parametrize("error", PASSING, ids=named)
def test_what_may_pass_is_waited_for(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=named)
def test_what_will_not_pass_is_not_waited_for(error: Exception) -> None:
    assert not is_transient(error)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleep moves; the pauses that were made."""
    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    monkeypatch.setattr(retry.time, "monotonic", lambda: sum(pauses))
    return pauses


def failing(times: int, error: Exception) -> Callable[[int], int]:
    def attempt(number: int) -> int:
        if number < times:
            raise error
        return number

    return attempt


def test_pauses_grow_to_a_bound_and_differ_from_process_to_process() -> None:
    for number, longest in enumerate((0.25, 0.5, 1, 2, 4, 5, 5)):
        pauses = [pause_s(number) for _ in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
        assert len(set(pauses)) > 40


def test_a_server_that_is_away_for_a_minute_is_survived(clock: list[float]) -> None:
    def attempt(number: int) -> str:
        if sum(clock) < 60:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        return "answer"

    assert with_retries(attempt, "s3://x") == "answer"
    assert len(clock) < 30


def test_a_server_that_stays_away_is_given_up_with_its_last_error(clock: list[float]) -> None:
    error = ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(ConnectionResetError) as raised:
        with_retries(failing(1000, error), "s3://x")
    assert raised.value is error
    assert 60 < sum(clock) <= retry.GIVE_UP_AFTER_S
    with (
        pytest.raises(StorageError, match=r"s3://x.*reset \(after \d+ tries in \d+ s\)"),
        storage_failures("s3://x"),
    ):
        raise error


def test_what_will_not_pass_is_raised_at_once(clock: list[float]) -> None:
    with pytest.raises(PermissionError):
        with_retries(failing(1, PermissionError("no")), "s3://x")
    assert clock == []


def test_our_own_bugs_are_not_tried_again(clock: list[float]) -> None:
    def attempt(number: int) -> None:
        clock.append(1)
        raise KeyError("bug")

    with pytest.raises(KeyError):
        with_retries(attempt, "s3://x")
    assert clock == [1]


def test_a_long_wait_is_said_once(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with_retries(failing(3, TimeoutError()), "s3://x")
    assert caplog.messages == []
    with_retries(failing(12, TimeoutError()), "s3://y")
    assert len(caplog.messages) == 1
    assert "s3://y" in caplog.text


@pytest.mark.parametrize(
    "answer", [PermissionError("no"), FileNotFoundError("no"), answered("NoSuchBucket", 404)]
)
def test_whatever_is_answered_the_storage_is_reachable(answer: Exception) -> None:
    def ask() -> None:
        raise answer

    check_reachable(ask, "s3://x", 5)


def test_a_black_hole_is_told_in_time() -> None:
    answered = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        check_reachable(lambda: answered.wait(60), "s3://x", 0.2)
    assert not answered.is_set()
    answered.set()


def test_where_nobody_listens_is_told_before_the_time_is_up(clock: list[float]) -> None:
    def ask() -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    with pytest.raises(ConnectionRefusedError):
        check_reachable(ask, "s3://x", 25)
    assert 5 < sum(clock) <= retry.REFUSED_S


def test_options_that_are_wrong_are_told() -> None:
    def ask() -> None:
        raise ConfigError("storage_options: no")

    with pytest.raises(ConfigError):
        check_reachable(ask, "s3://x", 5)


DATA = bytes(range(256)) * 100


class Flaky(io.BytesIO):
    """A remote file whose `read` fails where it is told to; `size` as fsspec's files have it."""

    size: int | None = len(DATA)

    def __init__(self, trouble: list[Any], data: bytes = DATA) -> None:
        super().__init__(data)
        self._trouble = trouble

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        trouble = self._trouble.pop(0) if self._trouble else None
        if isinstance(trouble, Exception):
            raise trouble
        return data[:trouble] if isinstance(trouble, int) else data


class Stream(Flaky):
    """One that goes only forward, as a web server's without ranges; its size is not known."""

    size = None

    def seek(self, offset: int, whence: int = 0) -> int:
        raise ValueError("Cannot seek streaming HTTP file")


def opened(kind: type[Flaky], trouble: list[Any], versions: list[str] | None = None) -> RemoteFile:
    told = iter(versions or ["1"] * 100)
    return RemoteFile(
        lambda: kind(trouble), lambda file: next(told), lambda: storage_failures("s3://x"), "s3://x"
    )


@pytest.mark.parametrize("kind", [Flaky, Stream])
def test_a_stream_goes_on_where_it_was_after_resets(clock: list[float], kind: type[Flaky]) -> None:
    reset = ConnectionResetError(errno.ECONNRESET, "reset")
    file = opened(kind, [None, reset, None, reset, reset, None])
    pieces = []
    while piece := file.read(1000):
        pieces.append(piece)
    assert b"".join(pieces) == DATA
    assert len(clock) >= 3


def test_a_body_that_ends_early_is_read_again(clock: list[float]) -> None:
    file = opened(Flaky, [7, 0])
    assert file.read(1000) == DATA[:1000]
    file = opened(Flaky, [7, 0, 0])
    assert file.read() == DATA
    assert len(clock) >= 1


def test_short_pieces_are_put_together() -> None:
    file = opened(Stream, [10, None])
    assert len(file.read(10)) == 10
    assert file.tell() == 10


def test_a_file_that_changed_meanwhile_is_never_mixed(clock: list[float]) -> None:
    file = opened(Flaky, [None, TimeoutError()], ["1", "2"])
    file.read(10)
    with pytest.raises(StorageError, match="s3://x changed while it was read"):
        file.read(10)


def test_a_stream_is_read_from_its_start_again_where_one_goes_back() -> None:
    file = opened(Stream, [])
    assert file.read(100) == DATA[:100]
    file.seek(50)
    assert file.read(10) == DATA[50:60]
    buffer = bytearray(5)
    assert file.readinto(buffer) == 5
    assert buffer == DATA[60:65]
    with pytest.raises(io.UnsupportedOperation):
        file.seek(0, io.SEEK_END)
