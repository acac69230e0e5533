"""How long visitors of `serve` wait: many clients that search by id, over a million vectors.

    python tests/bench/bench_serve.py [--vectors 1000000] [--clients 50] [--seconds 600] [--think-s 0]

Makes an output of clustered vectors with an index (kept in --folder for the next time), starts the server
and clients in processes of their own, and tells the percentiles of the waits, errors, and the server's
memory before and after. Every client asks for random ids and waits for its answer; with --think-s it rests
between.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.config import IndexConfig
from pipeline.index.build import build_index
from tests.serving import serving
from tests.vector_output import commit_vectors, empty_output

_ROWS = 20_000


def make_output(folder: Path, count: int, dim: int) -> Path:
    """Vectors around a thousand centres, some in a commit."""
    out = folder / f"serve-{count}-{dim}"
    if (out / "index" / "CURRENT").exists():
        return out
    output = empty_output(out)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, dim)).astype(np.float32)
    for number in range(count // _ROWS):
        kinds = rng.integers(len(centres), size=_ROWS)
        noise = rng.standard_normal((_ROWS, dim)).astype(np.float32)
        commit_vectors(output, f"s{number:04d}", centres[kinds] + 0.7 * noise)
    build_index(output, IndexConfig())
    return out


def memory_mb(pid: int) -> float:
    """Resident memory, mapped files apart."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


async def client(port: int, ids: list[str], until: float, think_s: float, waits: list[float]) -> int:
    """Ask until then; how many answers were errors."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    errors = 0
    while time.monotonic() < until:
        query = urllib.parse.urlencode({"id": random.choice(ids), "k": 10})
        started = time.monotonic()
        writer.write(f"GET /api/search?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split()[0])
        body = await reader.readexactly(size)
        waits.append(time.monotonic() - started)
        errors += b" 200 " not in head[:20] or b'"hits": [{' not in body
        if think_s:
            await asyncio.sleep(random.uniform(0, 2 * think_s))
    writer.close()
    return errors


async def visit(port: int, ids: list[str], args: argparse.Namespace) -> None:
    """Print what the visitors of one process saw, as JSON."""
    waits: list[float] = []
    until = time.monotonic() + args.seconds
    tasks = [client(port, ids, until, args.think_s, waits) for _ in range(args.clients)]
    errors = sum(await asyncio.gather(*tasks))
    p50, p95, p99 = np.percentile(waits, [50, 95, 99]) * 1000
    facts = {"requests": len(waits), "per_s": len(waits) / args.seconds, "errors": errors}
    logging.info(
        json.dumps({**facts, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "max_ms": 1000 * max(waits)})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--think-s", type=float, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-serve")
    parser.add_argument("--port", type=int, help="(of the clients' own process)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.port:
        ids = [f"s{n:04d}#{row}" for n in range(args.vectors // _ROWS) for row in range(0, _ROWS, 97)]
        asyncio.run(visit(args.port, ids, args))
        return
    out = make_output(args.folder, args.vectors, args.dim)
    started = time.monotonic()
    with serving(out, cache=args.folder / "cache") as server:
        logging.info(
            f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}; "
            f"the server was up after {time.monotonic() - started:.1f} s"
        )
        words = [sys.executable, __file__, "--port", str(server.port), *sys.argv[1:]]
        warm = [*words, "--seconds", "10"]
        subprocess.run(warm, check=True, stderr=subprocess.DEVNULL)
        before = memory_mb(server.process.pid)
        subprocess.run(words, check=True)
        logging.info(
            f"memory of the server: {before:.0f} MiB before, {memory_mb(server.process.pid):.0f} after"
        )


if __name__ == "__main__":
    main()
