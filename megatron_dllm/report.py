"""One page about a finished conversion: `python -m megatron_dllm.report --chain runs/demo`.

Reads what the chain's jobs wrote (metrics, validations, samples, times), writes CHAIN/report.html, which needs no
other file, and prints the table of results.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.validation import read_validation, validation_elbo
from megatron_dllm.compose import register_schemas
from megatron_dllm.config import TrainConfig
from megatron_dllm.data.batch import Batch, collate
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import LENGTH, RowStream
from megatron_dllm.diffusion.noise import NoiseSpec
from megatron_dllm.reporting import pictures
from megatron_dllm.run.files import write_text
from megatron_dllm.run.names import CHECKPOINTS, CONFIG, METRICS, VALIDATION

_ROLES = ("masked", "visible", "clean")
_ROWS_LOOKED_AT = 64
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f5f5f5;padding:.8em;overflow-x:auto;
white-space:pre-wrap}mark{background:#cdeac0}figure{margin:1.5em 0}figcaption{color:#555;font-size:13px}
"""


@dataclass(frozen=True)
class Result:
    """One line of the results: a model, its bound in nats per token and bits per byte."""

    name: str
    measure: str
    nats: float
    bits: float | None


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training records, validation records) of a run folder, in order."""
    records = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    return [r for r in records if "validation" not in r], [r for r in records if "validation" in r]


def load_config(run: Path) -> TrainConfig:
    """The configuration a run was made with."""
    register_schemas()
    merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(run / CONFIG))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, TrainConfig), "config.yaml is the schema's own"
    return config


def example_row(config: TrainConfig) -> tuple[Batch, str]:
    """A packed row of the schedule's last stage, of several documents if there is one, and what it shows."""
    stage = list(config.schedule.stages.values())[-1]
    corpus = Corpus(config.data.train, config.model)
    geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
    dataset = RowDataset(
        corpus,
        geometry,
        NoiseSpec.for_stage(config.noise, stage),
        config.run.seed,
        config.model.mask_token_id,
        config.model.pad_token_id,
    )
    stream = RowStream(corpus.document_lengths, config.run.seed, config.data.packing_chunk, spans=corpus.spans)
    plans = [stream.next(geometry) for _ in range(_ROWS_LOOKED_AT)]
    plan = max(plans, key=lambda plan: int((plan.segments[:, LENGTH] > 2 * stage.block_size).sum()))
    return collate([dataset[plan]]), (
        f"A row of {geometry.row_length} tokens, {len(plan.segments)} segments, block size {stage.block_size}"
    )


def results(
    base: list[dict[str, Any]], convert: list[dict[str, Any]], checkpoints: Path, merged: dict[str, Any] | None
) -> list[Result]:
    """The lines of the table, from validation records and validation.json files."""
    lines = []
    if base:
        last = base[-1]
        lines.append(
            Result("AR base", "exact NLL", last["validation_elbo/ar"], last.get("validation_bits_per_byte/ar"))
        )
    target = next(k for k in convert[-1] if k.startswith("validation_elbo/")).split("/")[1]
    key, bits = f"validation_elbo/{target}", f"validation_bits_per_byte/{target}"
    for record in convert:
        if record["is_stage_end"] and key in record:
            name = "before conversion" if record["step"] == 0 else f"after {record['stage']}"
            lines.append(Result(name, f"ELBO, block {target}", record[key], record.get(bits)))
    ranked = sorted(
        (elbo, f) for f in folders.list_checkpoints(checkpoints) if (elbo := validation_elbo(f)) is not None
    )
    if ranked:
        stored = read_validation(ranked[0][1]) or {}
        lines.append(
            Result(
                f"best checkpoint ({ranked[0][1].name})",
                f"ELBO, block {target}",
                ranked[0][0],
                stored.get("bits_per_byte", {}).get(target),
            )
        )
    if merged is not None:
        lines.append(
            Result(
                "merged checkpoint",
                f"ELBO, block {target}",
                merged["elbo"][target],
                merged["bits_per_byte"].get(target),
            )
        )
    return lines


def _figure(image: bytes, caption: str) -> str:
    data = base64.b64encode(image).decode()
    return f'<figure><img src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _samples(samples: list[dict[str, Any]]) -> str:
    return "".join(
        f"<pre>{html.escape(s['prompt'])}<mark>{html.escape(s['text'])}</mark></pre><p>{s['num_generated_tokens']} "
        f"tokens, {s['tokens_per_forward']:.2f} tokens per forward</p>"
        for s in samples
    )


def _tokens_per_forward(samples: list[dict[str, Any]]) -> float | None:
    forwards = sum(s["num_denoising_forwards"] for s in samples)
    return sum(s["num_generated_tokens"] for s in samples) / forwards if forwards else None


def write_report(chain: Path) -> Path:
    """Write CHAIN/report.html and print the table; returns the file.

    Raises:
        ValueError: the chain has not been trained yet.
    """
    if not (chain / "convert" / METRICS).is_file():
        raise ValueError(f"chain ({chain}) has no convert/metrics.jsonl; run the chain first.")
    train, convert = read_metrics(chain / "convert")
    if not convert:
        raise ValueError(
            f"chain ({chain}) has no validation in convert/metrics.jsonl; set evaluation.num_tokens and "
            "data.validation, and run it again."
        )
    config = load_config(chain / "convert")
    base = read_metrics(chain / "base")[1] if (chain / "base" / METRICS).is_file() else []
    merged_file = chain / "merged" / VALIDATION
    merged = read_json(merged_file) if merged_file.is_file() else None
    samples_file = chain / "samples.jsonl"
    samples = (
        [json.loads(line) for line in samples_file.read_text(encoding="utf-8").splitlines()]
        if samples_file.is_file()
        else []
    )
    books = json.loads((chain / "chain.json").read_text(encoding="utf-8")) if (chain / "chain.json").is_file() else {}
    times = {name: entry["seconds"] for name, entry in books.get("jobs", {}).items()}
    lines = results(base, convert, chain / "convert" / CHECKPOINTS, merged)
    page = chain / "report.html"
    write_text(page, _page(config, train, convert, lines, merged, samples, times))
    _print_table(lines, samples, times, page)
    return page


def _page(
    config: TrainConfig,
    train: list[dict[str, Any]],
    convert: list[dict[str, Any]],
    lines: list[Result],
    merged: dict[str, Any] | None,
    samples: list[dict[str, Any]],
    times: dict[str, float],
) -> str:
    ar_nll = next((line.nats for line in lines if line.name == "AR base"), None)
    batch, caption = example_row(config)
    rows = [[r.name, r.measure, f"{r.nats:.4f}", "-" if r.bits is None else f"{r.bits:.4f}"] for r in lines]
    tpf = _tokens_per_forward(samples)
    router = pictures.router_picture(train, _ROLES)
    parts = [
        f"<h1>Conversion {html.escape(config.run.name)}</h1>",
        _html_table(["model", "measure", "nats/token", "bits/byte"], rows),
        "" if tpf is None else f"<p>Decoding: {tpf:.2f} tokens per forward pass over {len(samples)} prompts.</p>",
        _figure(pictures.schedule_picture(train), "Block size and learning rate."),
        _figure(pictures.loss_picture(train), "Loss of the global batch; thick lines are running means of 9 records."),
        _figure(
            pictures.elbo_picture(convert, ar_nll, (merged or {"elbo": {}})["elbo"]),
            "The same held-out rows and the same noise at every checkpoint.",
        ),
        _figure(pictures.mask_picture(batch, caption), "Clean blocks that no later block reads are not stored."),
        "" if router is None else _figure(router, "Where masked, visible noisy and clean tokens are routed."),
        "<h2>Samples</h2>",
        _samples(samples),
        "<h2>Time</h2>",
        _html_table(["job", "seconds"], [[n, f"{s:.0f}"] for n, s in times.items()]),
    ]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(config.run.name)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _print_table(lines: list[Result], samples: list[dict[str, Any]], times: dict[str, float], page: Path) -> None:
    console = Console()
    table = Table("model", "measure", "nats/token", "bits/byte")
    for line in lines:
        table.add_row(line.name, line.measure, f"{line.nats:.4f}", "-" if line.bits is None else f"{line.bits:.4f}")
    console.print(table)
    tpf = _tokens_per_forward(samples)
    if tpf is not None:
        console.print(f"tokens per forward: {tpf:.2f}")
    if times:
        console.print("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items()))
    console.print(f"report: {page}")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, required=True, help="folder of a chain, e.g. runs/demo")
    try:
        write_report(parser.parse_args(arguments).chain)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
