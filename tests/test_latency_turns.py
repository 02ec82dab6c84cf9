"""Two real processes: one that measures keeps the other's steps waiting, and is not starved by them."""

import subprocess
import sys

STEPS = """
import sys, time
from hwprune.latency.turns import together
print("ready", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    with together():
        begin = time.monotonic_ns()
        time.sleep(0.002)
        print(begin, time.monotonic_ns(), flush=True)
"""


def test_who_measures_has_the_machine_to_itself() -> None:
    import time

    from hwprune.latency.turns import alone

    with subprocess.Popen([sys.executable, "-c", STEPS], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        assert worker.stdout.readline()
        with alone(), alone():  # nested, and granted although the worker never pauses
            begin = time.monotonic_ns()
            time.sleep(0.2)
            end = time.monotonic_ns()
        while True:  # until a step that began after the measurement
            start, stop = map(int, worker.stdout.readline().split())
            assert stop <= begin or start >= end
            if start >= end:
                break
        worker.kill()
