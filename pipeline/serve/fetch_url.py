"""An image behind a URL that a visitor named: of public addresses alone, within a size and a time.

The name is resolved once and the connection made to just the addresses that were judged, so that no second
answer of a name server leads elsewhere. Redirects are judged anew. Knows HTTP alone.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse

from pipeline.errors import SearchError

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = 3
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all of IPv6 that is given out to be reached from everywhere
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_SAFE = "/%:@!$&'()*+,;=~-._?"


def fetch_url(url: str, max_bytes: int, timeout_s: float) -> bytes:
    """The bytes behind a URL. Raises SearchError for what is not to be asked for, or does not come."""
    deadline = time.monotonic() + timeout_s
    for _ in range(_REDIRECTS + 1):
        found = _ask(url, max_bytes, deadline)
        if isinstance(found, bytes):
            return found
        try:
            url = urllib.parse.urljoin(url, found)
        except ValueError as error:
            raise SearchError("the URL leads to what is none") from error
    raise SearchError(f"the URL leads on more than {_REDIRECTS} times")


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, all of them public. SearchError otherwise."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise SearchError("the URL's host is not known") from error
    if not found or not all(_is_public(address) for address in found):
        raise SearchError("the URL's host is not a public one; such addresses are never asked")
    return sorted(found)


def _is_public(address: str) -> bool:
    try:
        judged = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(judged, ipaddress.IPv6Address):
        if judged in _NAT64:  # a gateway turns them into the IPv4 address that they end in
            judged = ipaddress.IPv4Address(int(judged) & 0xFFFF_FFFF)
        else:
            judged = judged.ipv4_mapped or judged.sixtofour or judged
    if isinstance(judged, ipaddress.IPv6Address) and judged not in _UNICAST:
        return False
    return judged.is_global and not judged.is_multicast


def _ask(url: str, max_bytes: int, deadline: float) -> bytes | str:
    """The bytes, or where the URL leads on."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise SearchError("this is no URL") from error
    if parts.scheme not in _PORTS or port != _PORTS[parts.scheme] or not parts.hostname or parts.username:
        raise SearchError("only http:// and https:// URLs at their usual ports are asked for")
    address = public_addresses(parts.hostname, port)[0]
    sock = _connect(parts.scheme, parts.hostname, address, port, deadline)
    watch = threading.Timer(_left(deadline), _hang_up, [sock])  # a server may answer a byte at a time
    watch.daemon = True
    watch.start()
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = sock
    try:
        target = urllib.parse.quote(parts.path or "/", safe=_SAFE)
        query = f"?{urllib.parse.quote(parts.query, safe=_SAFE)}" if parts.query else ""
        headers = {"Accept": "image/*", "User-Agent": "cvt-pipeline", "Connection": "close"}
        connection.request("GET", target + query, headers=headers)
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return answer.getheader("Location", "")
        if answer.status != 200:
            raise SearchError(f"the URL's server answers {answer.status}")
        data = answer.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise SearchError(f"the URL's image has more than {max_bytes:,} bytes")
        _left(deadline)  # an answer without a length also ends where we hang up
        return data
    except (OSError, http.client.HTTPException) as error:
        raise SearchError("the URL's server does not answer as it should, or not in time") from error
    finally:
        watch.cancel()
        connection.close()
        sock.close()


def _connect(scheme: str, host: str, address: str, port: int, deadline: float) -> socket.socket:
    try:
        plain = socket.create_connection((address, port), timeout=_left(deadline))
        if scheme == "http":
            return plain
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except OSError as error:
        raise SearchError("the URL's server cannot be reached") from error


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise SearchError("the URL's server does not answer in time")
    return left
