"""The tables and the picture of the study of an autoregressive clean half, from the results of its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import write_results
from benchmarks.seeds import png, spread
from megatron_dllm.run.files import write_bytes

Result = Mapping[str, Any]
DIGITS = 4
NOTE = (
    "Nats per token of held-out text (a vocabulary of 512); mean and standard deviation over seeds, lower is better. "
    "ELBO: at block 32 under the mask that a server computes (clean blocks of 32). own mask: under that of the last "
    "stage. AR NLL: of the next token by the same weights. block: the report's mask; causal: clean blocks of one; "
    "guided W: also an AR loss of weight W; returned W: guided, with the report's mask in the last quarter; half: with "
    "half the operations. Arms beside half have equal operations, by the planner's formulas. gain: how far the ELBO "
    "lies below that of block with the same seed. right, tokens per forward: of held-out questions after the same "
    "short fine-tuning of every arm under the report's mask, at threshold 0.9."
)


def write_study(paths: Iterable[Path], output: Path, about: Mapping[str, Any]) -> None:
    """Write `output`.md, .json and .png; nothing where there is no result yet.

    Args:
        paths: of the results of runs.
        output: without suffix.
        about: machine and settings.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]
    if not results:
        return
    tables = {size: rows_of([r for r in results if r["size"] == size]) for size in sorted({r["size"] for r in results})}
    named = {"runs": len(results), "minutes of all runs": round(sum(r["seconds"] for r in results) / 60)}
    write_results(output, "A clean half that stays autoregressive", {**about, **named}, tables, NOTE)
    write_bytes(output.with_suffix(".png"), picture(results))


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The table of one size: a row an arm, the report's first."""
    names = sorted({result["arm"] for result in results}, key=lambda name: (name != "block", name != "causal", name))
    reference = {result["seed"]: result["elbo"] for result in results if result["arm"] == "block"}
    rows = []
    for name in names:
        own = [result for result in results if result["arm"] == name]
        gains = [reference[result["seed"]] - result["elbo"] for result in own if result["seed"] in reference]
        rows.append(
            {
                "arm": name,
                "seeds": len(own),
                "document tokens": own[0]["document_tokens"],
                "operations": f"{own[0]['conversion_operations']:.3g}",
                "ELBO": spread([result["elbo"] for result in own], DIGITS),
                "own mask": spread([result["own_elbo"] for result in own], DIGITS),
                "AR NLL": spread([result["ar_nll"] for result in own], DIGITS),
                "gain": spread(gains, DIGITS) if gains and name != "block" else "",
                "right": spread([result["accuracy"] for result in own], 2),
                "tokens per forward": spread([result["tokens_per_forward"] for result in own], 2),
            }
        )
    return rows


def picture(results: Sequence[Result]) -> bytes:
    """ELBO under the served mask against operations, one panel a size, one line an arm."""
    from matplotlib.figure import Figure

    sizes = sorted({result["size"] for result in results})
    figure = Figure(figsize=(6.0 * len(sizes), 4.0), layout="constrained")
    for axis, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for name in sorted({result["arm"] for result in results if result["size"] == size}):
            curves = [result["curve"] for result in results if (result["size"], result["arm"]) == (size, name)]
            points = [
                [statistics.mean(axis_values) for axis_values in zip(*at, strict=True)]
                for at in zip(*curves, strict=True)
            ]
            style = ":" if name.startswith("returned") else "--" if name.startswith("guided") else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", label=name)
        axis.set(title=size, xlabel="floating-point operations", ylabel="ELBO at block 32, served mask (nats)")
        axis.legend(fontsize="x-small")
    return png(figure)
