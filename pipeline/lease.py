"""The lease: one run at a time on an output.

`lease/<generation>.json` is created create-only, renewed by its holder and expires `run.lease_s` after
the last renewal; a takeover creates the next generation. A holder asks before each commit whether it is
still the newest, and stops if not. A holder whose process on this host is gone is taken over at once.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import BusyError, OutputError, StorageError
from pipeline.storage import Storage

FOLDER = "lease"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: enough to name it, and to know on its own host whether it still lives."""

    run: str
    host: str
    boot: str
    pid: int
    pid_started: str
    since: float
    renewed: float

    def is_known_dead(self) -> bool:
        """Whether its process ran on this host, since its last boot, and is gone."""
        if (self.host, self.boot) != (socket.gethostname(), _boot()):
            return False
        return _pid_started(self.pid) != self.pid_started

    def expires(self, lease_s: float) -> float:
        return self.renewed + lease_s


class Lease:
    """A lease that this process holds. Release it when the run has ended.

    `keep` renews it from a thread of its own, however long the run is busy elsewhere; a process that was
    stopped and goes on finds by its clock that the lease has expired.
    """

    def __init__(self, output: Storage, holder: Holder, path: str, lease_s: float) -> None:
        self._output, self._holder, self._path, self._lease_s = output, holder, path, lease_s
        self._lost: BusyError | None = None
        self._released = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lease", daemon=True)

    def keep(self) -> None:
        """Renew from now on; what goes wrong is raised by `still_held` and `check`."""
        self._keeper.start()

    def _keep(self) -> None:
        while not self._released.wait(min(5.0, self._lease_s / 8)):
            try:
                self.renew()
            except BusyError as error:
                self._lost = error
                return
            except StorageError as error:  # tried again until the lease expires
                logger.warning("the lease could not be renewed: %s", error)

    def still_held(self) -> None:
        """Raise BusyError where it is known here, without a look at the storage, that the lease is lost."""
        if self._lost is not None:
            raise self._lost
        if time.time() >= self._holder.expires(self._lease_s):
            raise self._taken_over()

    def renew(self) -> None:
        """Renew, where a quarter of the time has passed since the last renewal."""
        now = time.time()
        if now - self._holder.renewed >= self._lease_s / 4:
            self.check()
            self._holder = replace(self._holder, renewed=now)
            self._output.write_bytes(self._path, _encode(self._holder))

    def check(self) -> None:
        """Raise BusyError unless this lease is still the newest, and ours."""
        self.still_held()
        paths = _listed(self._output, self._path.rpartition("/")[0])
        holder = _read(self._output, self._path) if paths and paths[-1] == self._path else None
        if holder is None or holder.run != self._holder.run:
            raise self._taken_over()

    def _taken_over(self) -> BusyError:
        return BusyError(
            f"{self._output.uri}: the lease of this run expired or was taken over, since it was not "
            f"renewed for {self._lease_s:.0f} s; this run stops, what it committed stays"
        )

    def release(self) -> None:
        """Give the lease back; nothing where another has taken it over."""
        self._released.set()
        if self._keeper.is_alive():
            self._keeper.join()
        holder = _read(self._output, self._path)
        if holder is not None and holder.run == self._holder.run:
            self._output.delete(self._path)


def acquire(output: Storage, run: str, lease_s: float, folder: str = FOLDER) -> Lease:
    """Take the lease of an output, or of a part of it, or raise BusyError: who holds it since when."""
    paths = _listed(output, folder)
    holder = _read(output, paths[-1]) if paths else None
    now = time.time()
    if holder is not None and not holder.is_known_dead() and now < holder.expires(lease_s):
        raise _busy(output, holder, lease_s)
    generation = int(Path(paths[-1]).stem) + 1 if paths else 1
    path = f"{folder}/{generation:08d}.json"
    pid = os.getpid()
    mine = Holder(run, socket.gethostname(), _boot(), pid, _pid_started(pid), now, now)
    try:
        output.create(path, _encode(mine))
    except FileExistsError as error:
        faster = _read(output, path)
        raise _busy(output, faster or mine, lease_s) from error
    for older in paths:
        output.delete(older)
    return Lease(output, mine, path, lease_s)


def read_holder(output: Storage) -> Holder | None:
    """Who holds the output, be it alive or not; None where nobody does."""
    paths = _listed(output, FOLDER)
    return _read(output, paths[-1]) if paths else None


def _busy(output: Storage, holder: Holder, lease_s: float) -> BusyError:
    since = datetime.fromtimestamp(holder.since, UTC).isoformat(timespec="seconds")
    left = max(0.0, holder.expires(lease_s) - time.time())
    return BusyError(
        f"{output.uri} is held by run {holder.run} (process {holder.pid} on {holder.host}) since {since}; "
        f"wait for it to end, or {left:.0f} s for its lease to expire if it is dead"
    )


def _listed(output: Storage, folder: str) -> list[str]:
    return [info.path for info in output.find(folder) if info.path.endswith(".json")]


def _read(output: Storage, path: str) -> Holder | None:
    try:
        return Holder(**json.loads(output.read_bytes(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{output.url(path)}: not a lease of this program ({error!r}); "
            "make sure that no run is at work, then delete it"
        ) from error


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _boot() -> str:
    """This boot and process namespace: within one of each, process numbers mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _pid_started(pid: int) -> str:
    """When a process of this host started, in the kernel's ticks; empty where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
