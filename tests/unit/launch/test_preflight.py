from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from launch.preflight import examine, judge, summary
from megatron_dllm.run.files import write_json

SETTINGS = {
    "gpus": 2,
    "min_free_disk_gib": 1.0,
    "min_free_memory_gib": 8.0,
    "node_bandwidth_gb_per_s": 300.0,
    "network_bandwidth_gb_per_s": 0.0,
}
HOSTS = [f"node{n}" for n in range(4)]


def report(node: int) -> dict[str, Any]:
    return {
        "host": HOSTS[node],
        "node": node,
        "versions": {"torch": "2.13", "python": "3.11"},
        "errors": [],
        "free_disk_gib": 100.0,
        "free_memory_gib": 100.0,
        "local_gb_per_s": 350.0,
        "gpus": [{"name": "H100", "free_gib": 78.0, "total_gib": 79.0}] * 2,
        "network": {
            "sum_is_right": True,
            "all_reduce_gb_per_s": 40.0,
            "to_next_gb_per_s": 45.0,
            "clock_seconds": 1000.0 + 0.01 * node,
        },
    }


def sentences(tmp_path: Path, change: Any, settings: dict[str, Any] = SETTINGS) -> list[str]:
    reports = [report(node) for node in range(4)]
    change(reports)
    for node, content in enumerate(copy.deepcopy(reports)):
        if content is not None:
            write_json(tmp_path / f"node_{node:05d}.json", content)
    return judge(tmp_path, HOSTS, settings)


def test_good_nodes_pass(tmp_path: Path) -> None:
    assert sentences(tmp_path, lambda reports: None) == []
    line = summary(tmp_path, 4)
    for text in (
        "4 nodes are good",
        "free memory 100.0 to 100.0 GiB",
        "node's GPUs 350.0 to 350.0 GB/s",
        "node to node 45.0 to 45.0 GB/s",
        "all-reduce 40.0 to 40.0 GB/s",
    ):
        assert text in line


def test_each_fault_names_its_node_alone(tmp_path: Path) -> None:
    def fault(text: str, change: Any) -> None:
        (sentence,) = sentences(tmp_path, change)
        assert sentence.startswith("node2: ") and text in sentence, sentence

    fault("has 1 of 2 GPUs", lambda r: r[2].update(gpus=r[2]["gpus"][:1]))
    fault(
        "another process holds it",
        lambda r: r[2].update(gpus=[r[2]["gpus"][0], {"name": "H100", "free_gib": 30.0, "total_gib": 79.0}]),
    )
    fault("GiB free in the run folder", lambda r: r[2].update(free_disk_gib=0.2))
    fault(
        "has 3.0 GiB of memory free, less than cluster.min_free_memory_gib (8)",
        lambda r: r[2].update(free_memory_gib=3.0),
    )
    fault("reach each other at 20.0 GB/s", lambda r: r[2].update(local_gb_per_s=20.0))
    fault("has torch 2.12, the others 2.13", lambda r: r[2]["versions"].update(torch="2.12"))
    fault("clock is off by +30 s", lambda r: r[2]["network"].update(clock_seconds=1030.0))
    fault("RuntimeError: no device", lambda r: r[2].update(errors=["RuntimeError: no device\nmore"], gpus=[]))
    fault("sum over all nodes came out wrong", lambda r: r[2]["network"].update(sum_is_right=False))

    def slow_links(reports: list[dict[str, Any]]) -> None:
        reports[1]["network"]["to_next_gb_per_s"] = 4.0
        reports[2]["network"]["to_next_gb_per_s"] = 5.0

    fault("its links reach 5.00 and 4.00 GB/s", slow_links)


def test_a_silent_node_is_named(tmp_path: Path) -> None:
    def lose(reports: list[Any]) -> None:
        reports[3] = None

    assert sentences(tmp_path, lose) == ["node3 gave no report"]


def test_this_machine_can_be_examined(tmp_path: Path) -> None:
    settings = {
        **SETTINGS,
        "gpus": 0,
        "min_free_disk_gib": 0.0,
        "min_free_memory_gib": 0.0,
        "run_folder": str(tmp_path),
    }
    found = examine(settings, 0, 1)
    assert found["errors"] == [] and found["versions"]["torch"] != "missing"
    assert found["free_disk_gib"] > 0 and found["free_memory_gib"] > 0
    write_json(tmp_path / "node_00000.json", found)
    assert judge(tmp_path, [found["host"]], settings) == []
    assert summary(tmp_path, 1).startswith("1 nodes are good: free memory")
