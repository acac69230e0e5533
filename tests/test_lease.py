"""The lease: one run at a time; a run that died does not hold the output for ever."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import BusyError
from pipeline.lease import Holder, acquire
from pipeline.storage import Storage


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def leases(output: Storage) -> list[str]:
    return [info.path for info in output.find("lease")]


def change_holder(output: Storage, **changes: object) -> Holder:
    """Rewrite the lease as another process would have written it."""
    (path,) = leases(output)
    holder = Holder(**json.loads(output.read_bytes(path)))
    changed = dataclasses.replace(holder, **changes)
    output.write_bytes(path, json.dumps(dataclasses.asdict(changed)).encode())
    return changed


def test_a_second_run_is_refused_and_told_who_holds_the_output(output: Storage) -> None:
    acquire(output, "first", 120)
    with pytest.raises(BusyError, match=r"held by run first \(process \d+ on .+\) since 20\d\d-.*1\d\d s"):
        acquire(output, "second", 120)
    assert leases(output) == ["lease/00000001.json"]


def test_a_released_lease_is_free_and_leaves_nothing(output: Storage) -> None:
    acquire(output, "first", 120).release()
    assert leases(output) == []
    acquire(output, "second", 120).check()


def test_an_expired_lease_is_taken_over_and_its_holder_notices(output: Storage) -> None:
    first = acquire(output, "first", 120)
    first.check()
    change_holder(output, renewed=time.time() - 121)
    second = acquire(output, "second", 120)
    second.check()
    assert leases(output) == ["lease/00000002.json"]
    with pytest.raises(BusyError, match="taken over"):
        first.check()
    first.release()
    second.check()


def test_a_lease_is_not_taken_over_a_moment_before_it_expires(output: Storage) -> None:
    acquire(output, "first", 120)
    change_holder(output, renewed=time.time() - 115, host="elsewhere")
    with pytest.raises(BusyError):
        acquire(output, "second", 120)


def test_a_lost_holder_stays_lost_when_its_successor_has_ended(output: Storage) -> None:
    first = acquire(output, "first", 120)
    change_holder(output, renewed=0)
    acquire(output, "second", 120).release()
    with pytest.raises(BusyError):
        first.check()
    acquire(output, "third", 120)
    with pytest.raises(BusyError):
        first.check()


def test_renewing_keeps_the_lease_and_a_lost_one_cannot_be_renewed(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = acquire(output, "first", 120)
    start = time.time()
    for passed in (100, 200, 300):
        monkeypatch.setattr(time, "time", lambda now=start + passed: now)
        lease.renew()
        with pytest.raises(BusyError):
            acquire(output, "second", 120)
    monkeypatch.setattr(time, "time", lambda: start + 421)
    second = acquire(output, "second", 120)
    with pytest.raises(BusyError):
        lease.renew()
    second.check()


DIE = "import sys; from pipeline.lease import acquire; from pipeline.storage import Storage; "


def test_a_run_that_was_killed_on_this_host_is_taken_over_at_once(output: Storage) -> None:
    command = [sys.executable, "-c", DIE + "acquire(Storage(sys.argv[1]), 'killed', 1000)", output.uri]
    subprocess.run(command, check=True)
    assert leases(output) == ["lease/00000001.json"]
    acquire(output, "second", 1000).check()


def test_a_process_number_that_was_given_out_again_is_not_the_holder(output: Storage) -> None:
    acquire(output, "first", 120)
    change_holder(output, pid_started="1")
    acquire(output, "second", 120).check()


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"boot": "earlier"}])
def test_a_holder_elsewhere_is_not_judged_by_the_processes_of_this_host(
    output: Storage, where: dict[str, str]
) -> None:
    acquire(output, "first", 120)
    change_holder(output, pid_started="1", **where)
    with pytest.raises(BusyError):
        acquire(output, "second", 120)


def test_of_two_takeovers_at_once_one_wins(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire(output, "first", 120)
    change_holder(output, renewed=0)
    create = Storage.create

    def create_later(self: Storage, relative: str, data: bytes) -> None:
        monkeypatch.setattr(Storage, "create", create)
        acquire(output, "faster", 120)
        create(self, relative, data)

    monkeypatch.setattr(Storage, "create", create_later)
    with pytest.raises(BusyError, match="held by run faster"):
        acquire(output, "slower", 120)
