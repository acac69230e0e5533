"""Which failures of storage pass by themselves, and how long to wait for that.

The clients' own retries see to single requests (pipeline/filesystems.py bounds them); here a whole
operation is tried again, until GIVE_UP_AFTER_S after its first failure: time enough for a server that
restarts. Opens nothing, and imports no client: their errors are known by name.
"""

from __future__ import annotations

import errno
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipeline.errors import PipelineError, StorageError

GIVE_UP_AFTER_S = 75.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
REFUSED_S = 10.0
_SAY_AFTER_S = 5.0

_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "gcsfs.retry": ("HttpError", "ChecksumError"),
    "botocore.parsers": ("ResponseParserError",),
    "http.client": ("IncompleteRead",),
    "urllib3.exceptions": ("IncompleteRead",),
}
_STATUSES = {408, 429, 500, 502, 503, 504}
_CODES = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
_ERRNOS = {
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
_TYPES = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "azure.core.exceptions.IncompleteReadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",  # what some throttling answers come to
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "gcsfs.retry.ChecksumError",
    "google.auth.exceptions.TransportError",
    "http.client.IncompleteRead",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "socket.gaierror",
    "urllib3.exceptions.IncompleteRead",
}
_LASTING = {
    "CertificateError",
    "ClientConnectorCertificateError",
    "ClientSSLError",
    "SSLCertVerificationError",
}
_LASTING |= {"ProxySchemeUnknown", "SSLError"}  # a certificate, or an address, that stays wrong

T = TypeVar("T")

logger = logging.getLogger(__name__)


def storage_errors() -> tuple[type[Exception], ...]:
    """OSError, and what the clients of object stores that are in use raise beside it."""
    found: list[type[Exception]] = [OSError]
    for module, classes in _ERRORS.items():
        if module in sys.modules:  # else none of its errors can have been raised
            found += [getattr(sys.modules[module], name) for name in classes]
    return tuple(found)


class TruncatedError(ConnectionError):
    """A body ended before its announced length."""


def is_transient(error: BaseException) -> bool:
    """Whether a failure may pass by itself: the connection, the server's load, a body cut short."""
    if isinstance(error, StorageError):
        return False  # it has been waited for already
    for link in _chain(error):
        classes = type(link).__mro__
        if any(kind.__name__ in _LASTING for kind in classes):
            return False
        status, code = _answer(link)
        if status or code:
            return status in _STATUSES or code in _CODES
        if any(f"{kind.__module__}.{kind.__name__}" in _TYPES for kind in classes):
            return True
        if getattr(link, "errno", None) in _ERRNOS:
            return True
    return False


def status_of(error: BaseException) -> int:
    """The HTTP status of the answer that a failure comes from; 0 where there was none."""
    return next((status for status, _ in map(_answer, _chain(error)) if status), 0)


def with_retries(attempt: Callable[[int], T], place: str, give_up_after_s: float | None = None) -> T:
    """`attempt(0)`, and where that fails for the moment `attempt(1)`, and so on, with growing pauses.

    Raises what the last attempt raised, with a note of how long it was tried.
    """
    limit_s = GIVE_UP_AFTER_S if give_up_after_s is None else give_up_after_s
    began: float | None = None
    number = 0
    told = False
    while True:
        try:
            return attempt(number)
        except storage_errors() as error:
            if not is_transient(error):
                raise
            now = time.monotonic()
            began = now if began is None else began
            pause = pause_s(number)
            if now + pause - began > limit_s:
                error.add_note(f"after {number + 1} tries in {now - began:.0f} s")
                raise
            if now - began > _SAY_AFTER_S and not told:
                logger.warning("storage does not answer at %s; trying for %.0f s", place, limit_s)
                told = True
        time.sleep(pause)
        number += 1


def check_reachable(ask: Callable[[], None], place: str, timeout_s: float) -> None:
    """Raise what keeps `ask` from an answer, TimeoutError where there is none in time.

    Asked in a thread, since no client can be trusted to give up. Where nobody listens, or the name does
    not resolve, it is asked again for REFUSED_S: a server may just be starting.
    """
    failed: list[Exception] = []

    def run() -> None:
        try:
            with_retries(lambda number: ask(), place, min(REFUSED_S, timeout_s / 2))
        except storage_errors() as error:
            if is_transient(error):  # else that was an answer
                failed.append(error)
        except PipelineError as error:
            failed.append(error)

    asking = threading.Thread(target=run, name="reachable", daemon=True)
    asking.start()
    asking.join(timeout_s)
    if failed:
        raise failed[0]
    if asking.is_alive():
        raise TimeoutError(f"no answer within {timeout_s:.0f} s")


def pause_s(number: int) -> float:
    """Seconds to wait after the failed attempt `number`: doubling up to a bound, the upper half random."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**number) * random.uniform(0.5, 1.0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: Any) -> tuple[int, str]:
    """The HTTP status and the error code in a server's answer; 0 and "" where there was none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return _number(status), str(response.get("Error", {}).get("Code") or "")
    status = getattr(error, "status", None) or getattr(error, "status_code", None)  # aiohttp; azure
    status = status or getattr(error, "code", None) or getattr(response, "status_code", None)  # Google's
    return _number(status), str(getattr(error, "error_code", None) or "")


def _number(status: object) -> int:
    return int(status) if isinstance(status, int | str) and str(status).isdigit() else 0
