"""The engine's process yields to its parent, and is not starved by others."""

import os
import sys

import pytest
from support.engine_process import python
from support.engines import until

from mlx_mtp_backend.process import priority
from mlx_mtp_backend.process.priority import LOOK, may_return_from_idle, starved

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="schedules threads as Linux does")
# Computes on one core, with the one that the test takes from it; tells its own main thread.
WORK = """
    import os, threading
    from mlx_mtp_backend.process import priority
    priority.REST = 0.5
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    priority.yield_to_parent(10)
    print(threading.get_native_id(), flush=True)
    while True:
        sum(range(1000))
"""
HOG = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(flush=True)\nwhile True: pass"


def test_it_is_idle_until_it_would_starve():
    if not may_return_from_idle():
        pytest.skip("a process without privileges keeps its niceness alone")
    work, hogs = python(WORK), []
    try:
        thread = int(work.stdout.readline())
        until(lambda: os.sched_getscheduler(thread) == os.SCHED_IDLE)
        assert os.getpriority(os.PRIO_PROCESS, thread) == min(os.nice(0) + 10, 19)
        hogs.append(python(HOG))
        until(lambda: os.sched_getscheduler(thread) == os.SCHED_OTHER)
        assert os.getpriority(os.PRIO_PROCESS, thread) == min(os.nice(0) + 10, 19)
        until(lambda: os.sched_getscheduler(thread) == os.SCHED_IDLE)  # tries again
    finally:
        for process in [work, *hogs]:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("ran", "waited", "nice", "told"),
    [
        (LOOK, 0.0, 10, False),
        (0.0, 0.0, 10, False),  # nothing to do
        (0.001, LOOK - 0.001, 10, True),
        (LOOK / 8, LOOK * 7 / 8, 10, False),  # more than the niceness would give
        (LOOK / 12, LOOK * 11 / 12, 10, True),
        (LOOK / 12, LOOK * 11 / 12, 19, False),
        (0.001, 0.05, 10, False),  # a trifle
    ],
)
def test_starved_is_what_gets_less_than_its_niceness_would_give(ran, waited, nice, told):
    assert starved(ran, waited, nice) is told


def test_without_privileges_the_niceness_is_all(monkeypatch):
    def refused(thread: int, policy: int) -> None:
        if policy == os.SCHED_OTHER:
            raise PermissionError

    monkeypatch.setattr(priority, "_schedule", refused)
    assert not may_return_from_idle()
