"""Look a node over before training: GPUs, memory, disk, clock, versions, and the speed of its links.

    python launch/preflight.py RESULT_FOLDER SETTINGS_JSON            (one task a node)

Every node writes RESULT_FOLDER/NODE.json; `judge` compares them and names the bad ones. The only module of the
launcher that imports torch, and only here on the nodes: a collective cannot be measured without one. Where there are
no GPUs it checks what there is, over gloo.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.record import read_json
from megatron_dllm.run.files import write_json

PACKAGES = ("torch", "megatron-core", "numpy", "transformers", "hydra-core", "omegaconf")
# Large enough for the links to be busy, small enough to be over in a second: 256 MiB of float32 on GPUs, 4 MiB on CPUs.
GPU_ELEMENTS, CPU_ELEMENTS = 1 << 26, 1 << 20
MAX_CLOCK_SKEW_SECONDS = 5.0
# A link is slow below this share of what was promised, or of the other nodes' median.
SLOW_SHARE = 0.5
# Free GPU memory below this share means that something else holds the card.
FREE_MEMORY_SHARE = 0.9


def versions() -> dict[str, str]:
    """Versions of the packages whose difference between nodes breaks or bends a run."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _gpus(torch: Any) -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": torch.cuda.get_device_name(index), "free_gib": free / 2**30, "total_gib": total / 2**30})
    return found


def _local_bandwidth(torch: Any, gpus: int) -> float:
    """GB/s at which a node's GPUs reach each other (slowest neighbour copy); 0 with fewer than two."""
    speeds = []
    for index in range(gpus if gpus > 1 else 0):
        source = torch.ones(GPU_ELEMENTS, device=f"cuda:{index}")
        target = torch.empty_like(source, device=f"cuda:{(index + 1) % gpus}")
        for is_measured in (False, True):
            torch.cuda.synchronize(index)
            begin = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize(index)
            torch.cuda.synchronize((index + 1) % gpus)
            if is_measured:
                speeds.append(source.numel() * 4 / (time.perf_counter() - begin) / 1e9)
    return min(speeds, default=0.0)


def _network(torch: Any, node: int, nodes: int, has_gpu: bool) -> dict[str, Any]:
    """Sum a known tensor over all nodes and pass one around the ring; what was reached and the clock's spread.

    Returns:
        `sum_is_right`, `all_reduce_gb_per_s` (bus bandwidth 2 (n-1)/n x size / time, the slowest of all nodes),
        `to_next_gb_per_s` (this node to the next), `clock_seconds` at a moment common to all nodes.
    """
    dist = torch.distributed
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        rank=node,
        world_size=nodes,
        init_method=f"tcp://{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 1}",
    )
    device = "cuda:0" if has_gpu else "cpu"
    tensor = torch.full((GPU_ELEMENTS if has_gpu else CPU_ELEMENTS,), float(node + 1), device=device)
    size = tensor.numel() * 4

    def timed(work: Any) -> float:
        dist.barrier()
        begin = time.perf_counter()
        work()
        if has_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    dist.all_reduce(tensor)
    is_right = bool((tensor == nodes * (nodes + 1) / 2).all())
    seconds = min(timed(lambda: dist.all_reduce(tensor)) for _ in range(3))
    received = torch.empty_like(tensor)

    def pass_on() -> None:
        work = [
            dist.P2POp(dist.isend, tensor, (node + 1) % nodes),
            dist.P2POp(dist.irecv, received, (node - 1) % nodes),
        ]
        for request in dist.batch_isend_irecv(work):
            request.wait()

    pass_on()
    to_next = min(timed(pass_on) for _ in range(3))
    dist.barrier()
    clock = time.time()
    dist.destroy_process_group()
    return {
        "sum_is_right": is_right,
        "all_reduce_gb_per_s": 2 * (nodes - 1) / nodes * size / seconds / 1e9,
        "to_next_gb_per_s": size / to_next / 1e9,
        "clock_seconds": clock,
    }


def free_memory_gib() -> float:
    """Memory that programs can still get, the page cache counted as free."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) / 2**20


def examine(settings: dict[str, Any], node: int, nodes: int) -> dict[str, Any]:
    """Everything about this node as plain data. Errors are data too: a node that cannot answer is named, not lost."""
    report: dict[str, Any] = {"host": socket.gethostname(), "node": node, "versions": versions(), "errors": []}
    disk = shutil.disk_usage(settings["run_folder"])
    report["free_disk_gib"] = disk.free / 2**30
    report["free_memory_gib"] = free_memory_gib()
    try:
        import torch

        report["gpus"] = _gpus(torch)
        count = len(report["gpus"])
        report["local_gb_per_s"] = _local_bandwidth(torch, count)
        if nodes > 1:
            report["network"] = _network(torch, node, nodes, count > 0 and settings["gpus"] > 0)
    except (ImportError, OSError, RuntimeError) as error:
        report["errors"].append(f"{type(error).__name__}: {error}")
    return report


def _node_problems(report: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What is wrong with a node by itself."""
    problems = [error.splitlines()[0] for error in report["errors"]]
    gpus = report.get("gpus", [])
    if not report["errors"] and len(gpus) < settings["gpus"]:
        problems.append(f"has {len(gpus)} of {settings['gpus']} GPUs")
    for index, gpu in enumerate(gpus[: settings["gpus"]]):
        if gpu["free_gib"] < FREE_MEMORY_SHARE * gpu["total_gib"]:
            problems.append(
                f"GPU {index} has {gpu['free_gib']:.1f} of {gpu['total_gib']:.1f} GiB free: another process holds it"
            )
    if report["free_disk_gib"] < settings["min_free_disk_gib"]:
        problems.append(
            f"has {report['free_disk_gib']:.1f} GiB free in the run folder, less than "
            f"cluster.min_free_disk_gib ({settings['min_free_disk_gib']:g})"
        )
    if report["free_memory_gib"] < settings["min_free_memory_gib"]:
        problems.append(
            f"has {report['free_memory_gib']:.1f} GiB of memory free, less than "
            f"cluster.min_free_memory_gib ({settings['min_free_memory_gib']:g})"
        )
    promised = settings["node_bandwidth_gb_per_s"]
    if len(gpus) > 1 and report["local_gb_per_s"] < SLOW_SHARE * promised:
        problems.append(
            f"its GPUs reach each other at {report['local_gb_per_s']:.1f} GB/s, less than half of "
            f"cluster.node_bandwidth_gb_per_s ({promised:g})"
        )
    if report.get("network") and not report["network"]["sum_is_right"]:
        problems.append("a sum over all nodes came out wrong")
    return problems


def _compared_problems(reports: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, list[str]]:
    """What is wrong with a node beside the others: versions, clock, links."""
    problems: dict[str, list[str]] = {report["host"]: [] for report in reports}
    for name in reports[0]["versions"]:
        found = [report["versions"][name] for report in reports]
        usual = statistics.mode(found)
        for report in reports:
            if report["versions"][name] != usual:
                problems[report["host"]].append(f"has {name} {report['versions'][name]}, the others {usual}")
    measured = [report for report in reports if report.get("network")]
    if len(measured) < 2:
        return problems
    middle = statistics.median(report["network"]["clock_seconds"] for report in measured)
    speeds = {report["node"]: report["network"]["to_next_gb_per_s"] for report in measured}
    promised = settings["network_bandwidth_gb_per_s"] or statistics.median(speeds.values())
    for report in measured:
        skew = report["network"]["clock_seconds"] - middle
        if abs(skew) > MAX_CLOCK_SKEW_SECONDS:
            problems[report["host"]].append(f"its clock is off by {skew:+.0f} s")
        # Both of a node's links slow: it is the node. One slow link alone may be either end's.
        links = (speeds[report["node"]], speeds.get((report["node"] - 1) % len(reports), promised))
        if max(links) < SLOW_SHARE * promised:
            problems[report["host"]].append(
                f"its links reach {links[0]:.2f} and {links[1]:.2f} GB/s, less than half of {promised:.2f}"
            )
    return problems


def judge(folder: Path, hosts: list[str], settings: dict[str, Any]) -> list[str]:
    """One sentence for every bad node; empty if all are good.

    Args:
        folder: where the nodes left their reports.
        hosts: the nodes that were asked, in order.
        settings: what a good node has.
    """
    by_node = {number: read_json(folder / f"node_{number:05d}.json") for number in range(len(hosts))}
    sentences = [f"{hosts[number]} gave no report" for number, report in by_node.items() if report is None]
    reports = [report for report in by_node.values() if report is not None]
    compared = _compared_problems(reports, settings) if reports else {}
    for report in reports:
        problems = _node_problems(report, settings) + compared[report["host"]]
        if problems:
            sentences.append(f"{report['host']}: {'; '.join(problems)}")
    return sentences


def _span(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def summary(folder: Path, nodes: int) -> str:
    """One line of what was measured on nodes that all gave a report."""
    reports = [read_json(folder / f"node_{number:05d}.json") for number in range(nodes)]
    words = [
        f"free memory {_span([report['free_memory_gib'] for report in reports])} GiB",
        f"free disk {_span([report['free_disk_gib'] for report in reports])} GiB",
    ]
    if all(len(report["gpus"]) > 1 for report in reports):
        words.append(f"between a node's GPUs {_span([report['local_gb_per_s'] for report in reports])} GB/s")
    if all("network" in report for report in reports):
        links = [report["network"] for report in reports]
        words += [
            f"from node to node {_span([link['to_next_gb_per_s'] for link in links])} GB/s",
            f"all-reduce {_span([link['all_reduce_gb_per_s'] for link in links])} GB/s",
        ]
    return f"{nodes} nodes are good: {', '.join(words)}"


def main() -> int:
    """Examine this node and leave its report."""
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    node, nodes = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    report = examine(settings, node, nodes)
    write_json(folder / f"node_{node:05d}.json", report)
    # Reports name what is wrong; a failing task would have srun kill the others before they have written theirs.
    return 0


if __name__ == "__main__":
    sys.exit(main())
