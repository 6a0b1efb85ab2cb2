"""Who yields to whom: threads on Linux."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp_backend.threads import LOWEST, started_by, yield_to_others

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")


def on_a_thread(work: Callable[[int], Any]) -> Any:
    """What `work` returns for its thread's id, computing on the CPU."""
    found: list[Any] = []

    def run() -> None:
        mx.set_default_device(mx.cpu)
        try:
            found.append(work(threading.get_native_id()))
        except PermissionError as error:
            found.append(error)
        mx.clear_streams()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("nice", [5, 19])
def test_only_what_computes_yields(nice: int) -> None:
    def work(own: int) -> tuple[int, list[int]]:
        yield_to_others(nice)
        computing = started_by(own)
        return os.getpriority(os.PRIO_PROCESS, own), [os.getpriority(os.PRIO_PROCESS, item) for item in computing]

    mine = os.getpriority(os.PRIO_PROCESS, 0)
    own, computing = on_a_thread(work)
    assert own == mine
    assert min(mine + nice, LOWEST) in computing


def test_under_a_real_time_policy_it_is_one_level_lower() -> None:
    def work(own: int) -> list[tuple[int, int]]:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(3))
        yield_to_others(5)
        threads = [own, *started_by(own)]
        return [(os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority) for thread in threads]

    found = on_a_thread(work)
    if isinstance(found, PermissionError):
        pytest.skip("no real-time policy here")
    assert found[0] == (os.SCHED_RR, 3)
    assert (os.SCHED_RR, 2) in found[1:]
