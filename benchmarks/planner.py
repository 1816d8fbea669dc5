"""The planner's time against published runs of other programs, and how long a search takes.

    python -m benchmarks.planner --output benchmarks/results/planner

Constants are fitted to the rows marked so; the others are held out. Over random halves, what a fit to one half says of
the other. No run is of this program: the table says how far constants carry from one program to another.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.planner_published import ROWS, observations
from benchmarks.record import machine, table, write_results
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.plan import compose_words, read_config
from megatron_dllm.planning.calibration import CONSTANTS, Observation, fit
from megatron_dllm.planning.run_plan import setting_of
from megatron_dllm.planning.search import search
from megatron_dllm.planning.work import assumed_work

_HALVES = 40


def published_rows(assumed: AssumptionsConfig) -> tuple[list[dict[str, Any]], AssumptionsConfig]:
    """Measured and predicted tokens a second of a GPU, and the constants fitted to the marked rows."""
    found = observations(assumed)
    fitted = fit([one for one, row in zip(found, ROWS, strict=True) if row.is_fitted], assumed)
    lines = []
    for row, one in zip(ROWS, found, strict=True):
        ratios = [math.exp(-one.error(constants)) for constants in (assumed, fitted)]
        lines.append(
            {
                "run": row.name,
                "fitted": "yes" if row.is_fitted else "",
                "tokens/s/GPU": row.tokens_per_second,
                "as assumed": f"{100 * (ratios[0] - 1):+.0f}%",
                "by the fit": f"{100 * (ratios[1] - 1):+.0f}%",
                "in the interval": "yes" if assumed.interval_low <= 1 / ratios[1] <= assumed.interval_high else "no",
                "source": row.source,
            }
        )
    return lines, fitted


def summary(assumed: AssumptionsConfig, fitted: AssumptionsConfig) -> list[dict[str, Any]]:
    """Errors of the rows that were held out, and of the held-out halves."""
    found = observations(assumed)
    held_out = [one for one, row in zip(found, ROWS, strict=True) if not row.is_fitted]
    halves = _halves(found, assumed)
    return [
        {"what": "as assumed, all rows", **_errors([abs(_off(one, assumed)) for one in found])},
        {"what": "held-out rows", **_errors([abs(_off(one, fitted)) for one in held_out])},
        {"what": f"held-out halves ({_HALVES} draws)", **_errors(halves)},
    ]


def _off(one: Observation, constants: AssumptionsConfig) -> float:
    return math.exp(-one.error(constants)) - 1.0


def _halves(found: list[Observation], assumed: AssumptionsConfig) -> list[float]:
    draw, errors = random.Random(0), list[float]()
    for _ in range(_HALVES):
        chosen = draw.sample(range(len(found)), len(found) // 2)
        constants = fit([found[number] for number in chosen], assumed)
        errors += [abs(_off(one, constants)) for number, one in enumerate(found) if number not in chosen]
    return errors


def _errors(errors: list[float]) -> dict[str, str]:
    return {
        "median": f"{100 * median(errors):.0f}%",
        "mean": f"{100 * sum(errors) / len(errors):.0f}%",
        "worst": f"{100 * max(errors):.0f}%",
    }


def searches() -> list[dict[str, Any]]:
    """Seconds of a search for each of three models."""
    lines = []
    for experiment, nodes in (("llada2_mini", 1), ("qwen3_30b_a3b", 2), ("llada2_flash", 8), ("llada2_flash", 64)):
        config, _ = read_config(compose_words([f"experiment={experiment}", f"nodes={nodes}"]))
        setting = setting_of(config)
        work = assumed_work(config, config.assumptions)
        start = time.process_time()
        found = search(setting, config, work, [config.num_gpus], "time")
        seconds = time.process_time() - start
        lines.append(
            {
                "run": experiment,
                "GPUs": config.num_gpus,
                "layouts": found.num_tried,
                "fitting": found.num_fitting,
                "CPU seconds": round(seconds, 2),
            }
        )
    return lines


def main() -> None:
    """Measure and print; with --output write the results too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    assumed = AssumptionsConfig(expert_imbalance=1.0)
    rows, fitted = published_rows(assumed)
    constants = {name: getattr(fitted, name) for name in CONSTANTS}
    inside = sum(row["in the interval"] == "yes" for row in rows)
    shown = ", ".join(f"{name} {value:.3g}" for name, value in constants.items())
    note = (
        f"Fitted: {shown}. {inside} of {len(rows)} rows lie in the interval {assumed.interval_low:g} to "
        f"{assumed.interval_high:g}. Experts balanced, as is assumed of the published runs."
    )
    tables = {"published runs": rows, "errors": summary(assumed, fitted), "search": searches()}
    for name, lines in tables.items():
        print(f"{name}\n{table(lines)}")
    print(note)
    if arguments.output is not None:
        write_results(arguments.output, "The planner", machine(), tables, note)


if __name__ == "__main__":
    main()
