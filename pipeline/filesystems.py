"""fsspec's file systems, opened: the only module that imports it.

Each client gets bounds here, which a user's storage_options override: seconds to connect and to wait for
an answer, and few retries of its own, since pipeline/retry.py stands above them. In all: S3 sends a
request up to 3 times (botocore), Google up to 6 (gcsfs), Azure up to 4, HTTP once; then the operation is
tried again as a whole, until 75 s have passed since it first failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
import fsspec.exceptions

from pipeline.errors import ConfigError
from pipeline.redact import URI_CREDENTIALS, scrub, split_credentials

CONNECT_S, READ_S = 10, 30
REQUEST_ATTEMPTS = 3
UPLOAD_S, UPLOAD_BYTES_PER_S = 60, 100_000
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}
_EXTRAS |= {"abfss": "azure"}
_FAMILIES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "https": "http"}


def open_filesystem(uri: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """The file system of `uri` and the path in it; ConfigError where it cannot be used."""
    protocol = _protocol(uri)
    if protocol == "memory":
        raise ConfigError(
            f"{uri}: memory:// lives in one process, so the workers would not see it; use a folder"
        )
    if protocol == "file":
        local = uri.removeprefix("file://")
        return fsspec.filesystem("file"), str(Path(local).expanduser().absolute())
    options = dict(options or {})
    shown, taken = split_credentials(uri)
    userinfo = taken.get("userinfo") or options.pop(URI_CREDENTIALS, {}).get("userinfo")
    real = shown.replace("://", f"://{userinfo}@", 1) if userinfo else shown
    try:
        with refusals(shown, options):
            fs, path = fsspec.core.url_to_fs(real, **_with_bounds(protocol, options))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'cvt-pipeline[{extra}]'" if extra else str(error)
        raise ConfigError(f"{shown}: no support for {protocol}:// is installed; {remedy}") from error
    if _family(uri) == "s3":
        fs.retries = 1  # s3fs would multiply botocore's
    return fs, path


@contextlib.contextmanager
def refusals(uri: str, options: Mapping[str, Any]) -> Iterator[None]:
    """ConfigError for options that a client does not take, which some tell only when they first connect."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        told = scrub(str(reason), options)
        raise ConfigError(f"{uri}: {told}; check the URI and its storage_options") from error


def upload(fs: Any, method: str, size_bytes: int, *arguments: Any, **options: Any) -> None:
    """Call a method that sends so many bytes; TimeoutError where a silent server takes them too slowly.

    The clients bound the wait for an answer, and not for a server that stops reading.
    """
    timeout_s = UPLOAD_S + size_bytes / UPLOAD_BYTES_PER_S
    sending = getattr(fs, f"_{method}", None)
    if sending is None:  # a client that knows no asyncio, and has bounds of its own
        getattr(fs, method)(*arguments, **options)
        return

    async def send() -> None:
        await asyncio.wait_for(sending(*arguments, **options), timeout_s)

    try:
        fsspec.asyn.sync(fs.loop, send)
    except fsspec.exceptions.FSTimeoutError as error:  # which has no words
        raise TimeoutError(f"{size_bytes:,} bytes were not taken within {timeout_s:.0f} s") from error


def same_service(one: str, other: str) -> bool:
    """Whether two URIs are of one kind of storage (of one host, over HTTP), so that options fit both."""
    if _family(one) != _family(other):
        return False
    return _family(one) in ("s3", "gs", "az") or urlsplit(one).hostname == urlsplit(other).hostname


def endpoint_of(uri: str, fs: Any, options: Mapping[str, Any]) -> str:
    """Where the requests for `uri` go, as far as that is known; empty for what is local."""
    family = _family(uri)
    inner = options.get("client_kwargs") or {}
    found = options.get("endpoint_url") or (inner.get("endpoint_url") if isinstance(inner, dict) else "")
    if family == "s3":
        client = getattr(fs, "_s3", None)
        found = client.meta.endpoint_url if client else found
        found = found or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    elif family == "gs":
        found = getattr(fs, "_location", "")
    elif family == "az":
        client = getattr(fs, "service_client", None)
        found = getattr(client, "primary_hostname", "")
    elif family != "file":
        found = found or urlsplit(uri).netloc
    return scrub(str(found or ""), {})


def _protocol(uri: str) -> str:
    return uri.split("://", 1)[0].lower() if "://" in uri else "file"


def _family(uri: str) -> str:
    protocol = _protocol(uri)
    return _FAMILIES.get(protocol, protocol)


def _with_bounds(protocol: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with timeouts and retries where they name none, and without a cache of listings."""
    family = _FAMILIES.get(protocol, protocol)
    bounds: dict[str, Any] = {"use_listings_cache": False}
    if family == "s3":
        retries = {"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS}
        timeouts = {"connect_timeout": CONNECT_S, "read_timeout": READ_S}
        config = {"retries": retries, "max_pool_connections": 32, **timeouts}
        return {**bounds, **options, "config_kwargs": {**config, **(options.get("config_kwargs") or {})}}
    if family == "gs":
        # gcsfs would ask a second service what kind of bucket it is, and log tracebacks of its retries
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        bounds["requests_timeout"] = _http_timeout()
    if family == "az":
        bounds |= {"connection_timeout": CONNECT_S, "read_timeout": READ_S}
    if family == "http":
        client = {"timeout": _http_timeout(), **(options.get("client_kwargs") or {})}
        return {**bounds, **options, "client_kwargs": client}
    return {**bounds, **options}


def _http_timeout() -> Any:
    from aiohttp import ClientTimeout

    return ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
