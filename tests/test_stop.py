"""A signal asks a run to stop, and ends it where it does not."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from pipeline.stop import GRACE_S

DEAF = """
import sys, time
from pipeline import stop
stop.GRACE_S = float(sys.argv[1])
stop.Stop().install()
print("ready", flush=True)
while True: time.sleep(0.1)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("grace_s", "signals"), [(0.3, 1), (600, 2)])
def test_who_does_not_heed_a_signal_is_ended_by_the_grace_or_by_a_second_one(
    signum: signal.Signals, grace_s: float, signals: int
) -> None:
    words = [sys.executable, "-c", DEAF, str(grace_s)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            process.send_signal(signum)
            if signals == 2:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
                process.send_signal(signum)
            assert process.wait(120) == 128 + signum
        finally:
            process.kill()


def test_the_grace_leaves_time_within_the_ten_seconds_that_are_promised() -> None:
    assert GRACE_S < 10
