"""A training step against what public trainers compute: tokens per second, peak memory, each saving alone, growth.

    python -m benchmarks.step                                             # everything; hours on two cores
    python -m benchmarks.step --quick                                     # a few minutes
    python -m benchmarks.step --sections throughput --lengths 4096 --blocks 32
    python -m benchmarks.step --device cuda --slice llada2_mini           # bf16, real sizes

Baseline and ours are the same megatron-core model with the same weights on the same noised documents; before
anything is timed, loss and gradients are checked to agree. A step is forward and backward; the optimizer, the same for
both, is left out. Tokens are document tokens. On a CPU, times are CPU seconds of one thread (other processes do not
count); the variants take turns, and the shortest repetition counts. Memory is the growth of the resident set on top of
weights and gradients, in one process per variant. On CUDA, times are wall seconds and memory is the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, machine, write_results
from benchmarks.step_cases import BASELINE, MODELS, OURS, OURS_RECOMPUTED, SLICES, Variant, ablations, model_config

SECTIONS = ("throughput", "ablation", "scaling")
SEPARATOR = "; "
CASE_COLUMNS = ("model", "grows", "value", "documents", "length", "block", "views")
# Dense bf16 TFLOP/s of a device whose name contains the key.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}


@dataclass(frozen=True)
class Case:
    """What one child process measures; `documents` is one, lognormal, or a number of equal documents."""

    model: str
    length: int
    documents: str | int
    block: int
    views: int
    task: str = "time"
    variants: dict[str, dict[str, bool]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    ranks: int = 1
    seed: int = 0


def run_child(case: Case) -> dict[str, Any]:
    """The child's result; every variant is marked as failed where the process died."""
    command = [sys.executable]
    if case.ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(case.ranks)]
    command += ["-m", "benchmarks.step_child", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode < 0:
        return {name: {"error": f"ended by signal {-done.returncode}"} for name in case.variants or ["ours"]}
    if done.returncode > 0:
        raise SystemExit(f"case {case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(case: Case, variants: dict[str, Variant]) -> dict[str, dict[str, Any]]:
    """Time and memory of the variants, and their ratios to those of the first."""
    named = {name: asdict(variant) for name, variant in variants.items()}
    results = run_child(replace(case, variants=named))
    if case.device == "cpu":
        for name, fields in named.items():
            if "error" not in results[name]:
                results[name] |= run_child(replace(case, task="memory", variants={name: fields}))[name]
    base = results[next(iter(variants))]
    for result in results.values():
        if "seconds" in result:
            result["tokens_per_second"] = case.length / result["seconds"]
            if "seconds" in base:
                result["speedup"] = base["seconds"] / result["seconds"]
        if "peak_bytes" in result and base.get("peak_bytes"):
            result["memory_ratio"] = result["peak_bytes"] / base["peak_bytes"]
    return results


def grid(args: argparse.Namespace) -> Iterator[Case]:
    """The cases of model, length, documents, block and views that were asked for."""
    for model in args.models:
        for length in args.lengths:
            for documents in args.documents:
                for block in dict.fromkeys(block or length for block in args.blocks):
                    for views in args.views:
                        if block <= length:
                            yield _case(args, model, length, documents, block, views)


def _case(
    args: argparse.Namespace, model: str, length: int, documents: str | int, block: int, views: int, **fields: Any
) -> Case:
    changes = {"num_layers": args.layers} if args.layers else {}
    return Case(
        model,
        length,
        documents,
        block,
        views,
        repeats=args.repeats,
        threads=args.threads,
        device=args.device,
        precision=args.precision,
        seed=args.seed,
        changes=changes | fields.pop("changes", {}),
        **fields,
    )


def describe(case: Case) -> dict[str, Any]:
    """The columns that name a case."""
    return dict(model=case.model, length=case.length, documents=case.documents, block=case.block, views=case.views)


def throughput_rows(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Baseline, ours, and ours with every layer recomputed in the backward pass, on one line."""
    results = measure(case, {"baseline": BASELINE, "ours": OURS, "recomputed": OURS_RECOMPUTED})
    base, ours, recomputed = results["baseline"], results["ours"], results["recomputed"]
    dense_pairs = case.views * (2 * case.length) ** 2
    row = describe(case) | {
        "baseline_tokens_s": base.get("tokens_per_second", base.get("error")),
        "ours_tokens_s": ours.get("tokens_per_second", ours.get("error")),
        "speedup": ours.get("speedup"),
        "baseline_mib": base.get("peak_bytes", 0) / 2**20,
        "ours_mib": ours.get("peak_bytes", 0) / 2**20,
        "memory_ratio": ours.get("memory_ratio"),
        "recomputed_speedup": recomputed.get("speedup"),
        "recomputed_memory_ratio": recomputed.get("memory_ratio"),
        "forward_tokens": ours["forward_tokens"] / base["forward_tokens"],
        "visible_pairs": ours["visible_pairs"] / dense_pairs,
        "difference": max(ours.get("loss_difference", 0.0), ours.get("gradient_difference", 0.0)),
    }
    if "seconds" in ours:
        tflops = ours["needed_flops"] / ours["seconds"] / 1e12
        row["needed_tflops_s"] = tflops
        if args.peak_tflops:
            row["mfu"] = tflops / args.peak_tflops
            row["baseline_mfu"] = (
                ours["needed_flops"] / base["seconds"] / 1e12 / args.peak_tflops if "seconds" in base else None
            )
    return [row]


def ablation_rows(case: Case, _: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each saving alone, and for ours without it."""
    is_moe = model_config(case.model, **case.changes).is_moe
    rows = []
    for name, result in measure(case, ablations(case.views, is_moe)).items():
        rows.append(
            describe(case)
            | {
                "variant": name,
                "tokens_s": result.get("tokens_per_second", result.get("error")),
                "speedup": result.get("speedup"),
                "mib": result.get("peak_bytes", 0) / 2**20,
                "memory_ratio": result.get("memory_ratio"),
                "difference": result.get("gradient_difference"),
            }
        )
    return rows


def scaling_cases(args: argparse.Namespace) -> Iterator[tuple[str, Any, Case]]:
    """(what grows, its value, case): row length, experts, documents of a row, ranks."""
    longest = max(args.lengths)
    for model in args.models:
        for length in (*args.lengths, 2 * longest):
            yield "length", length, _case(args, model, length, "one", 32, 1)
        for documents in (1, 4, 16, 64):
            yield "documents", documents, _case(args, model, longest, documents, 32, 1)
        if model_config(model).is_moe:
            for experts in (16, 32, 64, 128, 256):
                changes = {"num_moe_experts": experts}
                yield "experts", experts, _case(args, model, longest, "one", 32, 1, changes=changes)
        for ranks in args.ranks:
            yield "context ranks", ranks, _case(args, model, longest, "lognormal", 32, 1, ranks=ranks)


def scaling_row(axis: str, value: Any, case: Case) -> dict[str, Any]:
    """Time per document token, its attention part and the rest, and nanoseconds per visible pair."""
    result = run_child(replace(case, task="parts"))["ours"]
    total = result["step"] * 1e6 / case.length
    rest = result.get("without_attention")
    attention = None if rest is None else total - rest * 1e6 / case.length
    return {
        "model": case.model,
        "grows": axis,
        "value": value,
        "us_per_token": total,
        "rest_us_per_token": None if rest is None else rest * 1e6 / case.length,
        "attention_us_per_token": attention,
        "attention_ns_per_pair": None if attention is None else 1e3 * attention * case.length / result["visible_pairs"],
        "pairs_per_token": result["visible_pairs"] / case.length,
    }


def save(output: Path, about: dict[str, Any], sections: dict[str, list[dict[str, Any]]]) -> None:
    """Write the sections, with rows in the order of their cases."""
    for rows in sections.values():
        rows.sort(key=lambda row: [str(row[name]).zfill(9) for name in CASE_COLUMNS if name in row])
    write_results(output, "A training step, baseline and ours", about, sections)


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What several commands that filled one table were run on, and the commands: values that differ in a row."""
    values = {name: str(old.get(name, value)).split(SEPARATOR) for name, value in new.items()}
    return {
        name: old.get(name, value) if str(value) in values[name] else SEPARATOR.join([*values[name], str(value)])
        for name, value in new.items()
    }


def parse_arguments() -> argparse.Namespace:
    """Command line, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=[*MODELS, *SLICES])
    parser.add_argument("--slice", choices=sorted(SLICES), help="first layers of a real model instead of --models")
    parser.add_argument("--layers", type=int, help="layers of the model; default 4")
    parser.add_argument("--lengths", type=int, nargs="+", help="document tokens of a step")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 32, 512, 0], help="block sizes; 0: the length")
    parser.add_argument("--documents", nargs="+", default=["one", "lognormal"], choices=["one", "lognormal"])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="of the scaling section")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of documents and noise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on CUDA, fp32 on CPU")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for MFU; known GPUs are looked up")
    parser.add_argument("--quick", action="store_true", help="one short case of every kind")
    parser.add_argument("--output", type=Path, help="without suffix; default: benchmarks/results/step_DEVICE")
    parser.add_argument("--extend", action="store_true", help="keep the rows that the output has; measure the others")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch can see; there is none. Leave it out for the CPU.")
    if args.slice:
        args.models = [args.slice]
    if args.quick:
        args.lengths, args.blocks, args.views, args.repeats = [512], [32], [1], 1
    args.lengths = args.lengths or ([4096, 8192, 16384] if args.slice else [1024, 2048, 4096])
    if args.slice and args.blocks == [4, 32, 512, 0]:
        args.blocks = [32, 0]
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    if args.peak_tflops is None and args.device == "cuda":
        name = torch.cuda.get_device_name()
        args.peak_tflops = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
    return args


def main() -> None:
    """Command line."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    output = args.output or RESULTS / f"step_{args.device}{'_' + args.slice if args.slice else ''}"
    about = machine(torch.device(args.device)) | dict(precision=args.precision, repeats=args.repeats)
    sections: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    if args.extend and output.with_suffix(".json").exists():
        sections |= json.loads(output.with_suffix(".json").read_text())
        about = joined(sections.pop("about"), about)  # type: ignore[arg-type]
    for section, rows_of in (("throughput", throughput_rows), ("ablation", ablation_rows)):
        if section not in args.sections:
            continue
        cases = grid(args)
        if section == "ablation":  # at the longest row and block 32 alone
            length = max(args.lengths)
            cases = iter(
                [_case(args, model, length, "lognormal", 32, views) for model in args.models for views in args.views]
            )
        for case in cases:
            if any(describe(case).items() <= row.items() for row in sections[section]):
                continue
            sections[section] += rows_of(case, args)
            print(json.dumps(sections[section][-1]), flush=True)
            save(output, about, sections)
    if "scaling" in args.sections:
        for axis, value, case in scaling_cases(args):
            if any(
                {"model": case.model, "grows": axis, "value": value}.items() <= row.items()
                for row in sections["scaling"]
            ):
                continue
            sections["scaling"].append(scaling_row(axis, value, case))
            print(json.dumps(sections["scaling"][-1]), flush=True)
            save(output, about, sections)


if __name__ == "__main__":
    main()
