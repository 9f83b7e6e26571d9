"""One line for each node of a run: its host, its GPUs and how they are connected, its versions."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path

import psutil
import torch

from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import Config, ModelConfig
from megatron_completep.launch import Launch
from megatron_completep.model.attention import AttentionInputs, attend
from megatron_completep.parallel.exchange import Exchange
from megatron_completep.run.precision import choose_precision

DRIVER = Path("/proc/driver/nvidia/version")
NETWORK = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class RankReport:
    """What one rank says of where it runs. The first rank of a node also describes the node."""

    host: str
    gpu: str | None
    description: str | None = None
    versions: dict[str, str] | None = None


def node_lines(
    exchange: Exchange, launch: Launch, device: torch.device, config: Config
) -> list[str]:
    """One line for each node, and one for whatever differs between them; the same on every rank.

    On a GPU a call of attention with the configured heads tells which kernel serves them.
    Communicates over all ranks.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    report = RankReport(platform.node(), gpu)
    if launch.local_rank == 0:
        of_node = versions(device)
        if device.type == "cuda":
            precision = choose_precision(config.training.precision, device)
            of_node["attention"] = attention_kernel(config.model, precision, device)
        report = replace(report, description=describe_node(device), versions=of_node)
    return lines_of([RankReport(**fields) for fields in exchange.all_gather(asdict(report))])


def lines_of(reports: Sequence[RankReport]) -> list[str]:
    """The lines for the reports of all ranks."""
    ranks = Counter(report.host for report in reports)
    # Ranks of one node may see different GPUs, and are counted by name.
    gpus: dict[str, Counter[str]] = {host: Counter() for host in ranks}
    for report in reports:
        if report.gpu is not None:
            gpus[report.host][report.gpu] += 1

    lines = []
    versions_of: list[tuple[str, dict[str, str]]] = []
    for report in reports:
        if report.versions is None:
            continue
        host = report.host
        versions_of.append((host, report.versions))
        ranks_here = f"{ranks[host]} rank" if ranks[host] == 1 else f"{ranks[host]} ranks"
        if gpus[host]:
            counted_gpus = [f"{number} x {name}" for name, number in gpus[host].items()]
            ranks_here += f" on {', '.join(counted_gpus)}"
        listed_versions = ", ".join(
            f"{name} {version}" for name, version in report.versions.items()
        )
        lines.append(f"node {host}: {ranks_here}; {report.description}; {listed_versions}")
    return [*lines, *differing(versions_of)]


def differing(nodes: list[tuple[str, dict[str, str]]]) -> Iterator[str]:
    """A warning for each version that is not the same on all nodes.

    nodes: host and name -> version, by node.
    """
    if not nodes:
        return
    _, versions_of_first = nodes[0]
    # Nodes of one job have the same list of names; a missing version is "none".
    for name in versions_of_first:
        hosts: dict[str, list[str]] = {}
        for host, versions_of_host in nodes:
            hosts.setdefault(versions_of_host.get(name, "none"), []).append(host)
        if len(hosts) > 1:
            groups = [f"{version} on {', '.join(names[:4])}" for version, names in hosts.items()]
            yield f"warning: {name} differs between nodes: " + "; ".join(groups)


def describe_node(device: torch.device) -> str:
    """Processors, memory, and what connects the GPUs."""
    memory = psutil.virtual_memory().total / 2**30
    phrases = [f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"]
    if device.type == "cuda":
        phrases.append(reach(torch.cuda.device_count()))
        adapters = sorted(entry.name for entry in NETWORK.iterdir()) if NETWORK.is_dir() else []
        if adapters:
            phrases.append(f"network {', '.join(adapters)}")
        else:
            phrases.append("no InfiniBand or RoCE adapter")
    return ", ".join(phrase for phrase in phrases if phrase)


def reach(gpus: int) -> str:
    """Which GPUs of the node can access each other's memory; empty for one GPU."""
    pairs = list(permutations(range(gpus), 2))
    if not pairs:
        return ""
    direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    if direct == len(pairs):
        return "all GPUs reach each other directly"
    return f"{direct} of {len(pairs)} pairs of GPUs reach each other directly"


def versions(device: torch.device) -> dict[str, str]:
    """Name -> version of what must be the same on all nodes."""
    names = {"torch": str(torch.__version__), "python": platform.python_version()}
    if device.type == "cuda":
        names["driver"] = driver_version(DRIVER.read_text() if DRIVER.exists() else "")
        names["CUDA"] = str(torch.version.cuda)
        names["cuDNN"] = cudnn_version(torch.backends.cudnn.version())
        names["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return names


def cudnn_version(number: int | None) -> str:
    """The version as it is written; torch's is 10000 x major + 100 x minor + patch."""
    if number is None:
        return "none"
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def attention_kernel(model: ModelConfig, precision: torch.dtype, device: torch.device) -> str:
    """Which of torch's kernels serves the model's attention in training: cudnn, flash, ...

    "math" are plain products, "none" says that the configured kernel does not take such heads. A
    package is called by its name. A library that shadows another shows here, where a slow run would
    show nothing.
    """
    if model.attention_backend == "flash_attention":
        return model.attention_backend
    # Long enough for any kernel, and as far from a multiple of 128 as the model's sequences.
    length = min(model.seq_length, 512 + model.seq_length % 128)
    groups = num_query_groups(model)
    heads = []
    for count in (model.num_attention_heads, groups, groups):
        # [S, B, N, D] in memory, as the model has it.
        rows = torch.zeros(length, 1, count, head_dim(model), dtype=precision, device=device)
        heads.append(rows.permute(1, 2, 0, 3).requires_grad_())
    bias = None
    if model.position == "alibi":
        bias = torch.zeros(1, 1, length, length, dtype=precision, device=device)
    try:
        q, k, v = heads
        mixed = attend(q, k, v, AttentionInputs(bias=bias), 1.0, model.attention_backend)
    except RuntimeError:
        return "none"
    # Padding and slicing may stand around the kernel's node.
    node = mixed.grad_fn
    while node is not None:
        match = re.match(r"ScaledDotProduct(\w+?)Attention", node.name())
        if match:
            return match[1].lower()
        node = node.next_functions[0][0] if node.next_functions else None
    return "math"


def driver_version(text: str) -> str:
    """The version in the kernel module's description of itself.

    Such as `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  ...`.
    """
    match = re.search(r"Kernel Module(?: for \S+)?\s+(\d+\.[\d.]+)", text)
    return match[1] if match else "unknown"
