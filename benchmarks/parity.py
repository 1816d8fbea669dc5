"""The parity table: every layout trains what one rank trains.

    python -m benchmarks.parity [--layouts TP2 CP2 ...] [--stages ar mdlm ...]

From one checkpoint each layout takes two optimizer steps in each stage; loss, gradient norm and updated weights are
compared with those of one rank. Layouts that are wrong on purpose must fail. Writes benchmarks/results/parity.json
and .md. All ranks are gloo processes on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.parity_layouts import ADAM_EPS, BF16, BROKEN, LAYOUTS, LEARNING_RATE, STAGES, Layout
from benchmarks.parity_run import NUM_STEPS, Difference, Trained, compare, prepare
from benchmarks.ranks import run_ranks
from benchmarks.record import RESULTS, machine, markdown

ALL_LAYOUTS = {**LAYOUTS, **BF16, **BROKEN}
# The largest relative difference from one rank that rounding explains. Weights start at order 0.1 to 1 and move by
# about 1e-2 in two steps, so that rounding alone puts fp32 updates 100 times as far apart as weights.
TOLERANCES = {
    "fp32": dict(loss=1e-5, grad_norm=1e-5, weights=1e-5, update=1e-4, replica_spread=0.0),
    "bf16": dict(loss=5e-3, grad_norm=5e-2, weights=1e-1, update=1.5, replica_spread=0.0),
}
MEASURES = tuple(TOLERANCES["fp32"])


@dataclass(frozen=True)
class Result:
    """A layout against one rank: per stage the differences, and whether all ranks trained on the same data."""

    differences: dict[str, Difference]
    has_equal_data: dict[str, bool]

    def worst(self, measure: str) -> float:
        """Largest difference over the stages."""
        return max(getattr(difference, measure) for difference in self.differences.values())


def measure(
    layout: Layout, folder: str, expected: dict[str, Trained], stages: list[str], timeout_s: float = 300.0
) -> Result:
    """Run a layout on its ranks."""
    by_rank = run_ranks(compare, layout.world_size, layout, folder, expected, stages, timeout_s=timeout_s)
    has_equal_data = {
        stage: all(ranks[stage][1] == expected[f"{stage}_{layout.variant}"].fingerprints for ranks in by_rank)
        for stage in stages
    }
    return Result({stage: by_rank[0][stage][0] for stage in stages}, has_equal_data)


def violations(result: Result, precision: str) -> list[str]:
    """The measures that differ from one rank by more than rounding explains."""
    found = [
        f"{stage}: {name} differs by {getattr(difference, name):.1e} (at most {limit:g}; {difference.worst_tensor})"
        for stage, difference in result.differences.items()
        for name, limit in TOLERANCES[precision].items()
        if not getattr(difference, name) <= limit
    ]
    return found + [
        f"{stage}: samples, masks or noise levels differ"
        for stage, is_equal in result.has_equal_data.items()
        if not is_equal
    ]


def _rows(results: dict[str, Result]) -> list[dict[str, str]]:
    rows = []
    for name, result in results.items():
        layout = ALL_LAYOUTS[name]
        is_within = not violations(result, layout.parallel.precision)
        verdict = "within" if is_within else "**off**"
        if name in BROKEN:
            verdict = "off, as it must" if not is_within else "**not noticed**"
        rows.append(
            {
                "layout": name,
                "ranks": str(layout.world_size),
                **{measure: f"{result.worst(measure):.1e}" for measure in MEASURES},
                "data": "equal" if all(result.has_equal_data.values()) else "**differ**",
                "verdict": verdict,
            }
        )
    return rows


def _write(results: dict[str, Result], stages: list[str], output: Path) -> None:
    about = machine() | dict(ranks="gloo", steps=NUM_STEPS, learning_rate=LEARNING_RATE, adam_eps=ADAM_EPS)
    layouts = {
        name: {
            "ranks": ALL_LAYOUTS[name].world_size,
            "parallel": asdict(ALL_LAYOUTS[name].parallel),
            "stages": {stage: asdict(difference) for stage, difference in result.differences.items()},
            "has_equal_data": result.has_equal_data,
        }
        for name, result in results.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(
        json.dumps({"about": about, "tolerances": TOLERANCES, "layouts": layouts}, indent=1) + "\n"
    )
    note = (
        f"Relative difference from one rank after {NUM_STEPS} optimizer steps, the worst of the stages "
        f"{', '.join(stages)}. weights and update (the weights less where they started) are L2 norms, by the "
        "worst tensor; replica_spread is the largest absolute difference between two ranks' copies of one weight."
    )
    output.with_suffix(".md").write_text(
        markdown("Every layout against one rank", about, {"layouts": _rows(results)}, note)
    )


def _print_table(results: dict[str, Result], console: Console) -> None:
    table = Table(title="Relative difference from one rank, worst of the stages")
    rows = _rows(results)
    for index, name in enumerate(rows[0] if rows else ()):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        style = "red" if "**" in row["data"] + row["verdict"] else None
        table.add_row(*(cell.replace("**", "") for cell in row.values()), style=style)
    console.print(table)


def main() -> int:
    """Command line; 0 if every layout is within tolerance and every broken one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=list(ALL_LAYOUTS),
        default=list(ALL_LAYOUTS),
        metavar="NAME",
        help="some of: " + "; ".join(ALL_LAYOUTS),
    )
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--output", type=Path, default=RESULTS / "parity", help="without suffix")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console(width=None if sys.stdout.isatty() else 140)
    results: dict[str, Result] = {}
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        variants = {ALL_LAYOUTS[name].variant for name in args.layouts}
        (expected,) = run_ranks(prepare, 1, folder, variants, timeout_s=600.0)
        for name in track(args.layouts, description="layouts", console=console):
            try:
                results[name] = measure(ALL_LAYOUTS[name], folder, expected, args.stages, timeout_s=600.0)
                console.print(f"{name}: {_rows({name: results[name]})[0]['verdict'].strip('*')}")
            except (RuntimeError, TimeoutError) as error:
                errors[name] = str(error)
                console.print(f"{name}: did not run")
    _print_table(results, console)
    for name, error in errors.items():
        print(f"{name} did not run: {error}", file=sys.stderr)
    for name, result in results.items():
        found = violations(result, ALL_LAYOUTS[name].parallel.precision)
        if found and name not in BROKEN:
            print(f"{name}: " + "; ".join(found), file=sys.stderr)
    _write(results, args.stages, args.output)
    print(f"wrote {args.output}.json and {args.output}.md")
    is_right = all(
        (name in BROKEN) == bool(violations(result, ALL_LAYOUTS[name].parallel.precision))
        for name, result in results.items()
    )
    return 0 if is_right and not errors else 1


if __name__ == "__main__":
    sys.exit(main())
