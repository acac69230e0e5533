"""What every request passes first, and every answer last: who may ask, how much, and what a browser may do.

Without a token only this machine's own names are answered, since a page elsewhere can make a browser ask
127.0.0.1 under a name of its own (DNS rebinding). What changes something must come from our own page.
Bodies end at a size and a time. Knows ASGI alone, nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "cvt_pipeline_token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_READS = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Limits:
    """What a request may be: bytes of its body, and seconds in which it must have arrived."""

    body_bytes: int
    body_s: float


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


class Guard:
    """An ASGI application around another.

    `token` is what visitors must know, by a cookie that `/?token=…` gives them or as a bearer; None where
    only this machine is listened to, by `names`.
    """

    def __init__(self, app: App, *, token: str | None, names: Iterable[str], limits: Limits) -> None:
        self._app, self._token, self._limits = app, token, limits
        self._names = frozenset(name.lower() for name in (*LOOPBACK, *names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        started = refused = False

        async def sending(message: Message) -> None:
            nonlocal started
            if refused:  # nobody listens any more
                return
            if message["type"] == "http.response.start":
                started = True
                there = {name.decode().lower() for name, _ in message.get("headers", ())}
                extra = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k not in there]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        async def receiving() -> Message:
            nonlocal refused
            try:
                return await body()
            except RefusedError as error:
                if not started:
                    await _answer(sending, error.status, error.message)
                refused = True
                return {"type": "http.disconnect"}

        try:
            headers = _headers(scope)
            await self._check(scope, headers, sending)
            body = self._limited(headers, receive)
        except RefusedError as error:
            await _answer(sending, error.status, error.message)
            return
        if not started:  # with where to go instead
            with contextlib.suppress(ClientDisconnect):  # by us
                await self._app(scope, receiving, sending)

    async def _check(self, scope: Scope, headers: dict[str, str], send: Send) -> None:
        host = headers.get("host", "")
        if self._token is None:
            if _name_of(host) not in self._names:
                raise RefusedError(
                    403, f"{host or 'no host'} is no name of this server; set serve.names if it is one"
                )
        else:
            await self._check_token(self._token, scope, headers, send)
        if scope["method"] not in _READS:
            origin = headers.get("origin")
            if origin is not None and urllib.parse.urlsplit(origin).netloc.lower() != host.lower():
                raise RefusedError(403, "another site may not change anything here")
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                raise RefusedError(403, "another site may not change anything here")

    async def _check_token(self, token: str, scope: Scope, headers: dict[str, str], send: Send) -> None:
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        bearer = headers.get("authorization", "")
        if bearer.startswith("Bearer ") and _same(bearer.removeprefix("Bearer ").strip(), token):
            return
        if _same(_cookie(headers.get("cookie", "")), token):
            return
        given = query.get("token", [""])[0]
        if scope["method"] == "GET" and scope["path"] == "/" and _same(given, token):
            secure = "; Secure" if scope.get("scheme") == "https" else ""
            cookie = f"{COOKIE}={token}; Path=/; HttpOnly; SameSite=Lax; Max-Age=2592000{secure}"
            start = {
                "type": "http.response.start",
                "status": 303,
                "headers": [(b"location", b"/"), (b"set-cookie", cookie.encode())],
            }
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            return
        raise RefusedError(
            401, "open the address with ?token=… that the server printed, or send it as a bearer"
        )

    def _limited(self, headers: dict[str, str], receive: Receive) -> Receive:
        """`receive`, until the body has had its bytes or its time."""
        too_many = RefusedError(413, f"more than {self._limits.body_bytes:,} bytes")
        try:
            if int(headers.get("content-length", "0")) > self._limits.body_bytes:
                raise too_many
        except ValueError as error:
            raise RefusedError(400, "content-length is no number") from error
        deadline = asyncio.get_running_loop().time() + self._limits.body_s
        size, complete = 0, False

        async def receiving() -> Message:
            nonlocal size, complete
            if complete:  # what comes now is that the visitor has gone
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise RefusedError(408, f"not there within {self._limits.body_s:g} s") from error
            size += len(message.get("body", b""))
            if size > self._limits.body_bytes:
                raise too_many
            complete = not message.get("more_body", False)
            return message

        return receiving


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urllib.parse.urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _cookie(header: str) -> str:
    """Our cookie among those of all that this host serves, which Python's parser may not like."""
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), "")


async def _answer(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
