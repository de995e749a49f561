# SPDX-License-Identifier: Apache-2.0
"""NUMA nodes, whose memory is near to some cores and far from others."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

_NODES = Path("/sys/devices/system/node")
_taken: list[FileLock] = []  # held until the process ends


def numa_nodes(folder: Path = _NODES) -> dict[int, set[int]]:
    """Finds the CPUs of each NUMA node that has some: number of the node -> their numbers."""
    nodes = {}
    for node in folder.glob("node[0-9]*"):
        cpus: set[int] = set()
        for part in (node / "cpulist").read_text().strip().split(","):
            if bounds := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
                cpus.update(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
        if cpus:
            nodes[int(node.name.removeprefix("node"))] = cpus
    return dict(sorted(nodes.items()))


def nodes_of_cpus(cpus: set[int], nodes: dict[int, set[int]]) -> list[int]:
    """Finds the nodes to which some of `cpus` belong."""
    return [node for node, its_cpus in nodes.items() if its_cpus & cpus]


def bind_to_node(node: int, folder: Path = _NODES) -> None:
    """Lets this process, and the ones that it starts, run on the CPUs of one node alone.

    Memory is then taken from that node, too, as long as it has some: Linux gives a page where it is first touched.

    Raises:
        ValueError: there is no such node.
    """
    nodes = numa_nodes(folder)
    if node not in nodes:
        raise ValueError(f"There is no NUMA node {node} with CPUs; expected one of {', '.join(map(str, nodes))}.")
    os.sched_setaffinity(0, nodes[node])


def take_cores(count: int, folder: Path = _NODES, locks: Path | None = None) -> set[int]:
    """Lets this process run on `count` CPUs of one node, which no other process that calls this has.

    Args:
        locks: folder of the files that tell processes of one machine what is taken; they are free again when a process
            ends.

    Returns:
        The CPUs; all that the process had where no such set is free, with a warning.
    """
    allowed = os.sched_getaffinity(0)
    locks = locks or Path(tempfile.gettempdir()) / f"chatglm-ov-cores-{os.getuid()}"
    locks.mkdir(mode=0o700, exist_ok=True)
    for node, cpus in numa_nodes(folder).items():
        free = sorted(cpus & allowed)
        for start in range(0, len(free) - count + 1, count):
            lock = FileLock(locks / f"{node}-{count}-{start}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _taken.append(lock)
            taken = set(free[start : start + count])
            os.sched_setaffinity(0, taken)
            return taken
    logger.warning("No %d CPUs of one NUMA node are free; the process may use all %d.", count, len(allowed))
    return allowed


def warn_of_numa_nodes(folder: Path = _NODES) -> None:
    """Warns if the threads of this process may run on several nodes."""
    found = nodes_of_cpus(os.sched_getaffinity(0), numa_nodes(folder))
    if len(found) > 1:
        logger.warning(
            "The threads may run on %d NUMA nodes (%s), and each reads weights from the memory of the others. Start "
            "one server for each node: `numactl --cpunodebind=N --membind=N chatglm-ov serve`, or --numa-node N.",
            len(found),
            ", ".join(map(str, found)),
        )
