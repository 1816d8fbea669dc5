"""The two tables and the picture of the study of methods, from the results of its runs."""

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
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom: few seeds leave their own spread uncertain.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NOTE = (
    "ELBO at block 32 of held-out text, in nats per token (a vocabulary of 512), mean and standard deviation over "
    "seeds; lower is better. gain: how far a method lies below the reference with the same seed. clear: the 95 % "
    "interval of the gain (Student's t) leaves zero out, one comparison at a time. AR NLL: of the next token by the "
    "same weights. model tokens, ms a token: that the model computes, and that its steps take on this machine, for a "
    "document token. What is not clear is no difference that this study can tell. One tiny model and one corpus: the "
    "order may be another one at scale."
)


def write_methods(paths: Iterable[Path], output: Path, about: Mapping[str, Any], reference: str) -> None:
    """Write `output`.md, .json and .png; nothing where there is no result yet.

    Args:
        paths: of the results of runs.
        output: without suffix.
        about: machine and settings.
        reference: the method that others are compared with.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]
    if not results:
        return
    kinds = sorted({result["equal"] for result in results}, reverse=True)
    tables = {f"equal {kind}": rows_of([r for r in results if r["equal"] == kind], reference) for kind in kinds}
    named = {"runs": len(results), "minutes of all runs": round(sum(r["seconds"] for r in results) / 60)}
    write_results(output, "Methods of conversion side by side", {**about, **named}, tables, NOTE)
    write_bytes(output.with_suffix(".png"), picture(results, reference))


def rows_of(results: Sequence[Result], reference: str) -> list[dict[str, Any]]:
    """A row a method, the best first."""
    base = {result["seed"]: result["elbo"] for result in results if result["method"] == reference}
    own = {name: [r for r in results if r["method"] == name] for name in {result["method"] for result in results}}
    rows = []
    for name in sorted(own, key=lambda name: statistics.mean(r["elbo"] for r in own[name])):
        gains = [base[r["seed"]] - r["elbo"] for r in own[name] if r["seed"] in base]
        rows.append(
            {
                "method": name,
                "seeds": len(own[name]),
                "document tokens": own[name][0]["document_tokens"],
                "operations": f"{own[name][0]['operations']:.3g}",
                "ELBO": spread([r["elbo"] for r in own[name]], DIGITS),
                "gain": "" if name == reference else spread(gains, DIGITS),
                "clear": "" if name == reference else is_clear(gains),
                "AR NLL": spread([r["ar_nll"] for r in own[name]], DIGITS),
                "model tokens": f"{own[name][0]['model_tokens']:.2f}",
                "ms a token": f"{1e3 * statistics.mean(r['seconds_per_token'] for r in own[name]):.2f}",
            }
        )
    return rows


def is_clear(gains: Sequence[float]) -> str:
    """Whether the interval that holds the mean of the gains with 95 % leaves 0 out; ? for less than two seeds."""
    if len(gains) < 2:
        return "?"
    standard_error = statistics.stdev(gains) / len(gains) ** 0.5
    quantile = _STUDENT[min(len(gains) - 2, len(_STUDENT) - 1)]
    return "yes" if abs(statistics.mean(gains)) > quantile * standard_error else "no"


def picture(results: Sequence[Result], reference: str) -> bytes:
    """A panel for each kind of equality: every run's ELBO as a point, a line of them for each method."""
    from matplotlib.figure import Figure

    kinds = sorted({result["equal"] for result in results}, reverse=True)
    names = list(dict.fromkeys(result["method"] for result in results))
    figure = Figure(figsize=(5.5 * len(kinds), 1.2 + 0.3 * len(names)), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        own = [result for result in results if result["equal"] == kind]
        order = [row["method"] for row in rows_of(own, reference)][::-1]
        axis.plot([r["elbo"] for r in own], [order.index(r["method"]) for r in own], "o", alpha=0.7)
        axis.set(yticks=range(len(order)), yticklabels=order, xlabel="ELBO at block 32 (nats)", title=f"equal {kind}")
        axis.grid(axis="x", alpha=0.3)
    return png(figure)
