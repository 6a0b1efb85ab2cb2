"""Has the engine's process yield to its parent, where both compute on the same cores.

A niceness alone does not do: Linux counts a core that a nice thread keeps busy as busy, and leaves everything else on
the others, for most of a second at a time. Under SCHED_IDLE it counts as idle; but such a thread gets next to nothing
beside any other program, and needs privileges to become an ordinary one again. So it is used by a process that has
these, and while it costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

LOWEST = 19  # priority, by the measure of nice(2)
LOOK, REST = 0.25, 10.0  # seconds between looks, and without SCHED_IDLE once it was too little
WEIGHT = 1.25  # what a step of nice(2) is worth to Linux's scheduler, as a factor
_TASKS = Path("/proc/self/task")


def yield_to_parent(nice: int) -> None:
    """Lowers the priority of this process: by `nice` steps or, under a real-time policy, by one level of that. Threads
    that start later have the priority of those that start them."""
    if sys.platform != "linux":
        os.nice(nice)
        return
    policy, level = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    if policy in (os.SCHED_FIFO, os.SCHED_RR):
        for thread in _threads():
            os.sched_setscheduler(thread, policy, os.sched_param(max(1, level - 1)))
        return
    lowered = min(LOWEST, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    for thread in _threads():
        os.setpriority(os.PRIO_PROCESS, thread, lowered)
    if policy == os.SCHED_OTHER and may_return_from_idle():
        threading.Thread(target=_idle_while_it_costs_nothing, args=(nice,), name="priority", daemon=True).start()


def may_return_from_idle() -> bool:
    """Whether a thread of this process that is scheduled as idle may become an ordinary one, and the system tells how
    long threads wait. Tried on a thread that ends."""
    able: list[bool] = []

    def attempt() -> None:
        with contextlib.suppress(OSError):
            _times(threading.get_native_id())
            _schedule(threading.get_native_id(), os.SCHED_IDLE)
            _schedule(threading.get_native_id(), os.SCHED_OTHER)
            able.append(True)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(able)


def starved(ran: float, waited: float, nice: int) -> bool:
    """Whether threads got less of a core than with that niceness beside one ordinary thread.

    Args:
        ran, waited: seconds that they ran and waited for a core, together, since the last look.
    """
    return waited > LOOK / 2 and waited > ran * WEIGHT**nice


def _times(thread: int) -> tuple[float, float]:
    """Seconds that a thread has run, and has waited for a core."""
    ran, waited, _ = (_TASKS / str(thread) / "schedstat").read_text().split()
    return int(ran) / 1e9, int(waited) / 1e9


def _idle_while_it_costs_nothing(nice: int) -> None:
    while True:
        _schedule_others(os.SCHED_IDLE)
        ran, waited = _all_times()
        while True:
            time.sleep(LOOK)
            (ran_before, waited_before), (ran, waited) = (ran, waited), _all_times()
            if starved(ran - ran_before, waited - waited_before, nice):
                break
        _schedule_others(os.SCHED_OTHER)
        time.sleep(REST)


def _all_times() -> tuple[float, float]:
    ran = waited = 0.0
    for thread in _threads():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            own = _times(thread)
            ran, waited = ran + own[0], waited + own[1]
    return ran, waited


def _schedule_others(policy: int) -> None:
    for thread in _threads():
        if thread != threading.get_native_id():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                _schedule(thread, policy)


def _schedule(thread: int, policy: int) -> None:
    os.sched_setscheduler(thread, policy, os.sched_param(0))


def _threads() -> list[int]:
    return [int(name) for name in os.listdir(_TASKS)]
