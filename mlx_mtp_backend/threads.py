"""How urgent the engine's threads are, on Linux, where each thread has a priority of its own."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import mlx.core as mx

NAME = "mlx-engine"
LOWEST = 19
TASKS = Path("/proc/self/task")


def yield_to_others(nice: int) -> None:
    """Lowers the priority of the threads on which MLX computes for this one, by `nice` steps of 19; under a real-time
    policy, by one of that.

    This thread keeps its own: it holds the interpreter's lock as it builds a graph, and if others kept it from running
    then, the whole process would wait along.
    """
    if sys.platform != "linux" or not TASKS.exists():
        return
    own = threading.get_native_id()
    policy, level = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    lowered = min(LOWEST, os.getpriority(os.PRIO_PROCESS, own) + nice)
    for thread in started_by(own):
        if policy in (os.SCHED_FIFO, os.SCHED_RR):
            os.sched_setscheduler(thread, policy, os.sched_param(max(1, level - 1)))
        else:
            os.setpriority(os.PRIO_PROCESS, thread, lowered)


def started_by(own: int) -> list[int]:
    """Ids of the threads on which MLX computes for thread `own`, the calling one."""
    (TASKS / str(own) / "comm").write_text(NAME)  # threads inherit their name
    mx.eval(mx.zeros(1) + 1)  # MLX starts them with the first computation
    names = {int(task.name): (task / "comm").read_text().strip() for task in TASKS.iterdir()}
    return [thread for thread, name in names.items() if name == NAME and thread != own]
