"""A Ray cluster of several nodes on this machine, for tests: started in a process of its own, so that its
environment (token, temporary folder, caches of Ray's core) meets neither the tests' own Ray nor another's.

Run as a script it is that process: its argument has the nodes as JSON, a line of its standard input the
number of a node to kill, a line of its standard output an answer; at the end of its input it shuts down.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOON_MISSED = {  # a node's death is noticed after 2 s instead of 20
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
ON_ONE_MACHINE = {
    "object_store_memory": 200 * 2**20,
    "include_dashboard": False,
    "dashboard_agent_listen_port": 0,  # any: another Ray on this machine may have the usual one
}


class LocalCluster:
    """The tests' end of it. Node 0 is the head."""

    def __init__(self, process: subprocess.Popen[str], env: dict[str, str]) -> None:
        self._process = process
        self.address, self.dashboard, self.raylets = self._answer()
        self.env = {**env, "RAY_ADDRESS": self.address}

    def kill(self, node: int) -> None:
        """kill -9 of all that a node consists of."""
        assert self._process.stdin is not None
        print(node, file=self._process.stdin, flush=True)
        self._answer()

    def work_of(self, node: int) -> list[str]:
        """What the worker processes of a node are at: `MapBatches(decode_chunk)`, `MapWorker(...)`."""
        words = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = stat.read_text().rpartition(")")[2].split()[1]
                title = (stat.parent / "cmdline").read_bytes().partition(b"\0")[0].decode()
                if int(parent) == self.raylets[node] and title.startswith("ray::Map"):
                    words.append(title.removeprefix("ray::"))
        return words

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster's process ended"
        return json.loads(line)


@contextlib.contextmanager
def local_cluster(*nodes: dict[str, Any], **environ: str) -> Iterator[LocalCluster]:
    """A cluster of nodes as `Cluster.add_node` takes them, the head first; gone when the block ends."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # not pytest's: a socket's path has 107 bytes
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        **environ,
    }
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        text=True,
    )
    try:
        yield LocalCluster(process, env)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            assert process.wait(120) == 0
        finally:
            process.kill()  # Ray's reaper ends what it leaves
            shutil.rmtree(folder, ignore_errors=True)


def main(nodes: list[dict[str, Any]]) -> None:
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray talks on stdout

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    cluster = Cluster()
    members = []
    for node in nodes:
        head_alone = {} if members else {"_system_config": SOON_MISSED}
        members.append(cluster.add_node(**{**ON_ONE_MACHINE, **head_alone, **node}))
    cluster.wait_for_nodes()
    raylets = [member.all_processes["raylet"][0].process.pid for member in members]
    answer([cluster.address, cluster.webui_url, raylets])
    for line in sys.stdin:
        cluster.remove_node(members[int(line)], allow_graceful=False)
        answer("killed")
    cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
