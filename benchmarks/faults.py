"""What the caller is told where a backend fails, lane by lane, fault by stage: `make faults`.

Each cell starts a router (in this process) over real backends: Ollama's server is a double in a process of its own,
llama.cpp and the MLX engine run in their child processes, the engine on a thread where a fault is planted into it. One
request is brought to a stage, the fault happens, and what it was told is held against the lane's table. Meanwhile other
requests are answered by models that the fault must not reach; afterwards the model answers again, where the router can
bring that about, and no task, process, file, place or line may be left over.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
import threading
import time

from benchmarks import fault_cells, faults_llama, faults_mlx, faults_ollama
from benchmarks.fault_cells import STAGES, Lane
from router.backends import ollama_client

LANES = {"ollama": faults_ollama.LANE, "llama": faults_llama.LANE, "mlx": faults_mlx.LANE}


async def table(lane: Lane, only: str) -> tuple[int, int]:
    """Prints a lane. Returns how many cells there are and how many are wrong."""
    cells, wrong = 0, 0
    print(f"\n{lane.name:<24}" + "".join(f"{stage:<22}" for stage in STAGES))
    for fault in lane.expected:
        if only not in fault:
            continue
        row, remarks = [], []
        for stage in STAGES:
            told, problem = await fault_cells.cell(lane, fault, stage)
            cells += told != "-"
            row.append(f"{told}{' !' if problem else ''}")
            if problem:
                remarks.append(f"    {fault}, {stage}: {problem}")
        wrong += len(remarks)
        print("\n".join([f"{fault:<24}" + "".join(f"{item:<22}" for item in row), *remarks]), flush=True)
    return cells, wrong


async def settled(files: int, tasks: int) -> tuple[int, int]:
    """Files and tasks more than before, once gRPC has come to close its sockets."""
    left = 0, 0
    for _ in range(100):
        gc.collect()
        left = len(os.listdir("/dev/fd")) - files, len(asyncio.all_tasks()) - tasks
        if left[0] <= 0 and not left[1]:
            break
        await asyncio.sleep(0.1)
    return left


async def all_cells(lanes: list[Lane], only: str) -> int:
    began, cells, wrong = time.monotonic(), 0, 0
    for lane in lanes:
        first = next(iter(lane.expected))
        await fault_cells.cell(lane, first, "decode")  # imports and pools are there from now on
    gc.collect()
    files, tasks = len(os.listdir("/dev/fd")), len(asyncio.all_tasks())
    for lane in lanes:
        found = await table(lane, only)
        cells, wrong = cells + found[0], wrong + found[1]
    left = await settled(files, tasks)
    print(f"\n{cells} cells, {wrong} of them wrong; left over at the end: {left[0]} files, {left[1]} tasks; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if wrong or left[0] > 0 or left[1] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lane", choices=LANES, action="append", help="only this one; may be given again")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda told: None  # of an engine's thread that was made to fail
    ollama_client.MAX_LINE_BYTES = 2**20  # an endless line is given up sooner
    return asyncio.run(all_cells([LANES[name] for name in arguments.lane or LANES], arguments.only))


if __name__ == "__main__":
    sys.exit(main())
