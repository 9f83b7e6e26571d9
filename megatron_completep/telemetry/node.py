"""What the run stands on, a line for each node: host, GPUs and how they reach each other, driver, NCCL, torch."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

import psutil
import torch

from megatron_completep.launch import Launch
from megatron_completep.parallel.exchange import Exchange

DRIVER = Path("/proc/driver/nvidia/version")
NETWORK = Path("/sys/class/infiniband")


def node_lines(exchange: Exchange, launch: Launch, device: torch.device) -> list[str]:
    """One line for each node, and one for whatever differs between them; on every rank. Communicates over all ranks."""
    host = platform.node()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    own = (describe_node(device), versions(device)) if launch.local_rank == 0 else None
    return lines_of(exchange.all_gather((host, gpu, own)))


def lines_of(
    ranks: Sequence[tuple[str, str | None, tuple[str, dict[str, str]] | None]],
) -> list[str]:
    """From every rank: host, its GPU, and what the first rank of a node says of it."""
    gpus: dict[str, Counter[str]] = {}
    count = Counter(host for host, _, _ in ranks)
    for host, gpu, _ in ranks:
        gpus.setdefault(host, Counter()).update([gpu] if gpu else [])
    nodes = [(host, *said) for host, _, said in ranks if said is not None]
    lines = []
    for host, description, found in nodes:
        on = (
            f" on {', '.join(f'{number} x {name}' for name, number in gpus[host].items())}"
            if gpus[host]
            else ""
        )
        text = ", ".join(f"{name} {value}" for name, value in found.items())
        lines.append(
            f"node {host}: {count[host]} rank{'s' if count[host] > 1 else ''}{on}; {description}; {text}"
        )
    return [*lines, *differing([(host, found) for host, _, found in nodes])]


def differing(nodes: list[tuple[str, dict[str, str]]]) -> Iterator[str]:
    """A warning for each version that is not the same on all nodes."""
    for name in nodes[0][1] if nodes else ():
        hosts: dict[str, list[str]] = {}
        for host, found in nodes:
            hosts.setdefault(found.get(name, "none"), []).append(host)
        if len(hosts) > 1:
            yield f"warning: {name} differs between nodes: " + "; ".join(
                f"{value} on {', '.join(who[:4])}" for value, who in hosts.items()
            )


def describe_node(device: torch.device) -> str:
    """Processors, memory, and what connects the GPUs."""
    cores, memory = os.cpu_count(), psutil.virtual_memory().total / 2**30
    parts = [f"{platform.machine()}, {cores} cores, {memory:.0f} GiB"]
    if device.type == "cuda":
        parts.append(reach(torch.cuda.device_count()))
        adapters = sorted(entry.name for entry in NETWORK.iterdir()) if NETWORK.is_dir() else []
        parts.append(
            f"network {', '.join(adapters)}" if adapters else "no InfiniBand or RoCE adapter"
        )
    return ", ".join(part for part in parts if part)


def reach(gpus: int) -> str:
    """Which GPUs of the node reach each other's memory directly."""
    pairs = list(permutations(range(gpus), 2))
    direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    if not pairs:
        return ""
    return (
        "all GPUs reach each other directly"
        if direct == len(pairs)
        else f"{direct} of {len(pairs)} pairs of GPUs reach each other directly"
    )


def versions(device: torch.device) -> dict[str, str]:
    """What must be the same on all nodes."""
    found = {"torch": str(torch.__version__), "python": platform.python_version()}
    if device.type == "cuda":
        found["driver"] = driver_version(DRIVER.read_text() if DRIVER.exists() else "")
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def driver_version(text: str) -> str:
    """Of the kernel module's own description, such as `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  ...`."""
    match = re.search(r"Kernel Module(?: for \S+)?\s+(\d+\.[\d.]+)", text)
    return match[1] if match else "unknown"
