"""A TCP proxy that spoils some of what passes: throttling answers, resets in the middle of bodies, stalls.

Each request is looked at by itself (the proxy asks both sides to close the connection after it), and its
fate is drawn from a seed.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
from collections import Counter

_PIECE = 65536
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_THROTTLED = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_SLOW_DOWN), _SLOW_DOWN)
)
FATES = ("throttle", "reset", "lost", "stall")


class FlakyProxy:
    """Listens on a port of its own, and spoils a share `rate` of the requests to `port`.

    `throttle`: answered with 503 SlowDown. `reset`: the answer is cut somewhere in its first 200 kB.
    `lost`: carried out, and the connection reset before the answer. `stall`: cut off after a silence.
    """

    def __init__(self, port: int, rate: float, seed: int, stall_s: float = 4.0) -> None:
        self._upstream, self._rate, self._stall_s = port, rate, stall_s
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self.fates: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _draw(self) -> tuple[str, int]:
        with self._lock:
            spoiled = self._rng.random() < self._rate
            fate = self._rng.choice(FATES) if spoiled else "pass"
            self.fates[fate] += 1
            return fate, self._rng.randrange(200_000)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            head = _read_head(client)
            if not head:
                return
            fate, cut = self._draw()
            if fate == "throttle":
                client.sendall(_THROTTLED)
                return
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                lines = [
                    line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")
                ]
                lines.insert(1, b"Connection: close")
                server.sendall(b"\r\n".join(lines))
                self._pass_on(client, server, fate, cut)

    def _pass_on(self, client: socket.socket, server: socket.socket, fate: str, cut: int) -> None:
        """The rest of the request to the server, its answer to the client: as much as the fate allows."""
        passed = 0
        while True:
            ready, _, _ = select.select([client, server], [], [])
            if client in ready:
                body = client.recv(_PIECE)
                if not body:
                    return
                server.sendall(body)
            if server not in ready:
                continue
            data = server.recv(_PIECE)
            if not data:
                return
            if fate == "lost" or (fate in ("reset", "stall") and passed + len(data) > cut):
                client.sendall(b"" if fate == "lost" else data[: cut - passed])
                if fate == "stall":
                    self._closed.wait(self._stall_s)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            client.sendall(data)
            passed += len(data)


def _read_head(client: socket.socket) -> bytes:
    """The request up to and with its blank line, and what of the body came along."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = client.recv(_PIECE)
        if not data:
            return b""
        head += data
    return head
