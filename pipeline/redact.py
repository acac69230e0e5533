"""Credentials out of sight: in URLs, in messages, in whatever is stored or shown.

What a file system is given (`storage_options`) may all be secret, and is never shown. A URL may carry a
password before its host or a signature in its query: both are taken off it, and travel with the options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
URI_CREDENTIALS = "uri_credentials"
"""The storage option that holds what was taken off a URI: `{"userinfo": …, "query": …}`."""

_SIGNATURE = r"x-(?:amz|goog)-[\w-]+|awsaccesskeyid|googleaccessid|signature|sig|key-pair-id|policy"
_SECRET = rf"{_SIGNATURE}|(?:\w*[_-])?token|auth|password|secret|(?:api_?|access_?)?key"
_WITH_SIGNATURE = r"expires|s[etvrp]|spr|sip|sk(?:oid|tid|t|e|s|v)"  # no secrets, and new every time
_USERINFO = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]*@")
_IN_TEXT = re.compile(rf"(?<=[?&])({_SECRET})=[^\s&'\"<>)\]]*", re.IGNORECASE)
# What names a place, and has to be told when it does not answer.
_OPEN = {"endpoint_url", "account_host", "account_name", "region_name", "project", "default_location"}
_SHORTEST = 6  # shorter values would be found in common words


def split_credentials(uri: str, *, signatures_only: bool = False) -> tuple[str, dict[str, str]]:
    """A URI without its password and signature, and these: `userinfo` and `query`, where it has them.

    A token or a key may be what tells two images apart: with `signatures_only` they stay where they are.
    """
    found: dict[str, str] = {}
    if userinfo := _USERINFO.search(uri):
        found["userinfo"] = userinfo.group().removesuffix("@")
        uri = uri.replace(userinfo.group(), "", 1)
    base, _, query = uri.partition("?")
    if query and base.startswith(("http://", "https://")):
        words = query.split("&")
        secret = _named(words, _SIGNATURE if signatures_only else _SECRET)
        if secret:
            secret += _named(words, _WITH_SIGNATURE)
            found["query"] = "&".join(word for word in words if word in secret)
            rest = "&".join(word for word in words if word not in secret)
            uri = f"{base}?{rest}" if rest else base
    return uri, found


def join_query(uri: str, query: str) -> str:
    """`uri` with what `split_credentials` took from its query."""
    return f"{uri}{'&' if '?' in uri else '?'}{query}"


def scrub(text: str, options: Mapping[str, Any] | None = None) -> str:
    """A message without the credentials of URLs in it, and without the values of `options`."""
    text = _IN_TEXT.sub(rf"\1={HIDDEN}", _USERINFO.sub("", text))
    for secret in sorted(set(_secrets(options or {})), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _named(words: list[str], pattern: str) -> list[str]:
    return [word for word in words if re.fullmatch(pattern, word.partition("=")[0], re.IGNORECASE)]


def _secrets(values: object, name: str = "") -> Iterator[str]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _secrets(value, str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _secrets(value, name)
    elif isinstance(values, str) and name in ("connection_string", "query", "userinfo"):
        parts = re.split(r"[;&:]", values)
        secrets = (re.sub(r"^[\w-]+=", "", part) for part in parts)
        yield from (secret for secret in secrets if len(secret) >= _SHORTEST)
    elif isinstance(values, str | int) and name not in _OPEN and len(str(values)) >= _SHORTEST:
        yield str(values)
