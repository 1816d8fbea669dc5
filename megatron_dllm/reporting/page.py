"""The page of a report: HTML that needs no other file."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from megatron_dllm.checkpoint.folder import latest_checkpoint
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.reporting import pictures
from megatron_dllm.reporting.answers import answers_section, read_answers
from megatron_dllm.reporting.comparison import comparison_section, models_of_chain
from megatron_dllm.reporting.example_row import example_row
from megatron_dllm.reporting.held_out import measured_on
from megatron_dllm.reporting.history import Command, Duration, History, Run, Track, commit_of
from megatron_dllm.reporting.markup import figure, table
from megatron_dllm.reporting.records import Record, is_logged, number
from megatron_dllm.reporting.results import Result, drawn_beside
from megatron_dllm.reporting.study import read_study_files, study_section
from megatron_dllm.run.names import CHECKPOINTS

_STYLE = """
body{font:15px/1.55 system-ui,sans-serif;max-width:940px;margin:2.5em auto;padding:0 1em;color:#222}
h1{font-size:26px;margin:0 0 .2em}h2{font-size:19px;margin:2em 0 .4em;border-bottom:2px solid #00798c}
.lead{color:#555;margin:0 0 1.2em}table{border-collapse:collapse;margin:.8em 0}
td,th{padding:.22em .9em;border-bottom:1px solid #e3e3e3;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child,.facts td{text-align:left}.facts td:first-child{color:#555;white-space:nowrap}
.facts td{vertical-align:top;overflow-wrap:anywhere}code{font-size:13px}img{width:100%}img.narrow{width:66%}
pre{background:#f6f6f4;padding:.8em 1em;margin:.9em 0 .2em;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}
mark{background:#d7efd3}.fold{color:#999;font-style:italic}.small,figcaption{color:#666;font-size:13px}
figure{margin:1.2em 0}
.answer{font:13px/2.1 ui-monospace,monospace;margin:.5em 0}.answer b{font-weight:400;color:#555}
.token{padding:.15em .25em;border-radius:3px;white-space:pre}.token sub{font-size:9px;color:#555;padding-left:2px}
"""
_NUM_SAMPLES = 12
_NUM_CHANGES = 12
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n){2,}")


def page(history: History, lines: Sequence[Result]) -> str:
    """The whole page."""
    name = html.escape(history.folder.name)
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="lead">{html.escape(_lead(history))}</p>',
        _facts(history),
        "<h2>Results</h2>",
        _results(lines),
        *(part for track in reversed(history.tracks) for part in _track(track, history)),
        *answers_section(read_answers(history)),
        *study_section(read_study_files(history)),
        *comparison_section(models_of_chain(history)),
        *_samples(history.samples),
        *_durations(history.durations),
    ]
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def tokens_per_forward(samples: Sequence[Record]) -> float | None:
    """Generated tokens per denoising pass over all samples; None where that was not recorded."""
    forwards = sum(number(sample.get("num_denoising_forwards")) for sample in samples)
    tokens = sum(number(sample.get("num_generated_tokens")) for sample in samples)
    return tokens / forwards if forwards > 0 and tokens == tokens else None


# ---- what it is ---------------------------------------------------------------------------------


def _lead(history: History) -> str:
    run = history.runs[-1]
    records = [record for track in history.tracks if not track.is_autoregressive for record in track.training]
    sizes = [str(size) for size in dict.fromkeys(record.get("block_size") for record in records) if size]
    model = [
        str(run.setting("model", "family") or "a model"),
        _said("{} layers", run.setting("model", "num_layers")),
        _said("hidden size {}", run.setting("model", "hidden_size")),
        _said("{} experts", run.setting("model", "num_moe_experts")),
        _said("{} of them active", run.setting("model", "moe_router_topk")),
        _said("vocabulary of {}", run.setting("model", "vocab_size")),
    ]
    blocks = f"; block sizes {', '.join(sizes)}" if len(sizes) > 1 else ""
    return f"{', '.join(filter(None, model))}{blocks}."


def _said(text: str, value: object) -> str:
    return text.format(value) if value is not None else ""


def _facts(history: History) -> str:
    """Date, commit, command, machine and data; what all runs share stands there once."""
    rows = [
        ("Folder", html.escape(str(history.folder))),
        ("Date", _of_all(history, _dates)),
        ("Commit", _of_all(history, _commit)),
        ("Command", _of_all(history, lambda run: f"<code>{html.escape(_command(run, history))}</code>")),
        ("Machine", _of_all(history, lambda run: html.escape(_machine(run, history)))),
        ("Data", _of_all(history, _data)),
        ("Held out", _of_all(history, _held_out)),
    ]
    changes = [(run.name, text) for run in history.runs for text in run.changes]
    if changes:
        lines = (f"<b>{html.escape(name)}</b> {html.escape(text)}" for name, text in changes[:_NUM_CHANGES])
        more = len(changes) - _NUM_CHANGES
        note = [f"and {more} more (starts.jsonl)"] if more > 0 else []
        rows.append(("Changed on the way", "<br>".join([*lines, *note])))
    body = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="facts">{body}</table>'


def _of_all(history: History, describe: Callable[[Run], str]) -> str:
    """What `describe` says of each run as HTML: once where all are the same, else with the run's name."""
    said = [describe(run) for run in history.runs]
    if len(set(said)) == 1:
        return said[0]
    names = [html.escape(run.name) for run in history.runs]
    return "<br>".join(f"<b>{name}</b> {text}" for name, text in zip(names, said, strict=True))


def _dates(run: Run) -> str:
    times = [attempt.time for attempt in run.attempts if attempt.time == attempt.time]
    if not times:
        return "not recorded"
    first, *others = (datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC") for time in times)
    return f"{first} ({len(times)} attempts, the last one {others[-1]})" if others else first


def _commit(run: Run) -> str:
    commit, is_changed = commit_of(run)
    if not commit:
        return "not recorded"
    return f"<code>{html.escape(commit)}</code>{' with changes (git.txt)' if is_changed else ''}"


def _ranks(run: Run) -> int | None:
    newest = latest_checkpoint(run.folder / CHECKPOINTS)
    return read_meta(newest).provenance.world_size if newest else None


def _command(run: Run, history: History) -> str:
    """How a chain started the run, else how its recorded configuration is started."""
    command = history.commands.get(run.name)
    if command is None:
        arguments = ["-m", "megatron_dllm.train", "--config-dir", str(run.folder), "--config-name", "config"]
        command = Command(arguments, 1, _ranks(run) or 1)
    nodes = f"--nnodes {command.num_nodes} " if command.num_nodes > 1 else ""
    return f"torchrun {nodes}--nproc_per_node {command.ranks_per_node} {shlex.join(command.arguments)}"


def _machine(run: Run, history: History) -> str:
    hosts = dict.fromkeys(re.sub(r":\d+$", "", attempt.owner) for attempt in run.attempts if attempt.owner)
    ranks = _ranks(run)
    chosen = ("python", "torch", "megatron-core", "transformer-engine")
    versions = [line for line in history.packages if line.partition("==")[0].lower() in chosen]
    memory = max((number(record.get("peak_memory_gib")) for record in run.training), default=float("nan"))
    parts = [
        ", ".join(hosts) or "host not recorded",
        f"{ranks} rank{'s' * (ranks != 1)}" if ranks else "",
        f"{memory:.1f} GiB at most on rank 0" if memory == memory else "",
        ", ".join(line.replace("==", " ") for line in versions),
    ]
    return "; ".join(filter(None, parts))


def _data(run: Run) -> str:
    consumed = max((number(record.get("consumed_tokens")) for record in run.training), default=float("nan"))
    parts = [
        html.escape(str(run.setting("data", "train") or "not recorded")),
        f"{consumed:,.0f} document tokens seen" if consumed == consumed else "",
        _said("context length {}", run.setting("schedule", "context_length")),
        _said("seed {}", run.setting("run", "seed")),
    ]
    return "; ".join(filter(None, parts))


def _held_out(run: Run) -> str:
    return html.escape(measured_on(run.validations, run.setting("data", "validation")))


def _results(lines: Sequence[Result]) -> str:
    if not lines:
        return (
            "<p>Nothing was validated: set evaluation.num_tokens and data.validation for a run to measure itself.</p>"
        )
    return table(["model", "measure", "nats/token", "bits/byte"], [line.cells() for line in lines])


# ---- what happened ------------------------------------------------------------------------------


def _track(track: Track, history: History) -> list[str]:
    parts = [f"<h2>{html.escape(track.name)}</h2>"]
    if len(track.validations) > 1 and any(key.startswith("validation_elbo/") for r in track.validations for key in r):
        parts.append(_validation_figure(track, history))
    if not track.training:
        return [*parts, "<p>No step has been logged yet.</p>"]
    parts.append(
        figure(
            pictures.loss_picture(track.training),
            "Training loss: dots are logged steps, lines are means over 9 of them.",
        )
    )
    if is_logged(track.training, "block_size"):
        parts.append(figure(pictures.schedule_picture(track.training), "Block size and learning rate."))
    noise = pictures.noise_level_picture(track.training)
    if noise:
        parts.append(figure(noise, "NLL of masked tokens by noise level (means over 9 logged steps)."))
    parts.append(figure(pictures.speed_picture(track.training), "Throughput and gradient norm."))
    router = pictures.router_picture(track.training)
    if router:
        parts.append(
            figure(router, "Where the router sends masked, visible noisy and clean tokens, all layers together.")
        )
    return [*parts, _mask(track)]


def _validation_figure(track: Track, history: History) -> str:
    checkpoints, ar_nll = drawn_beside(track, history)
    stars = f" Stars: {', '.join(checkpoints)}." if checkpoints else ""
    caption = f"Validation: the same held-out rows and the same noise every time.{stars}"
    return figure(pictures.elbo_picture(track.validations, ar_nll, checkpoints), caption)


def _mask(track: Track) -> str:
    try:
        row = example_row(track.runs[-1])
    except (ValueError, OSError) as error:
        return f'<p class="small">No row of the run is drawn: {html.escape(str(error).rstrip("."))}.</p>'
    return figure(
        pictures.mask_picture(row.batch),
        f"{row.caption}. Clean blocks that no later block reads are not stored.",
        "narrow",
    )


# ---- what it writes, and how long it took ---------------------------------------------------------


def _samples(samples: Sequence[Record]) -> list[str]:
    if not samples:
        return []
    rate = tokens_per_forward(samples)
    lead = f"{len(samples)} prompts" + (f", {rate:.2f} tokens per forward pass" if rate else "")
    more = len(samples) - _NUM_SAMPLES
    return [
        "<h2>Samples</h2>",
        f'<p class="small">{lead}. What the model wrote is marked; blank lines are folded.</p>',
        *(_sample(sample) for sample in samples[:_NUM_SAMPLES]),
        f"<p>And {more} more.</p>" if more > 0 else "",
    ]


def _sample(sample: Record) -> str:
    tokens = sample.get("num_generated_tokens")
    rate = number(sample.get("tokens_per_forward"))
    notes = [
        f"{tokens} tokens" if tokens is not None else "",
        f"{rate:.2f} per forward pass" if rate == rate else "",
        _said("stopped by {}", sample.get("stop_reason")),
    ]
    return (
        f"<pre>{fold_blank_lines(sample['prompt'])}<mark>{fold_blank_lines(sample['text'])}</mark></pre>"
        f'<p class="small">{html.escape(", ".join(filter(None, notes)))}</p>'
    )


def fold_blank_lines(text: str) -> str:
    """The text as HTML, with two or more blank lines in a row folded into a note that counts them."""
    parts, end = [], 0
    for found in _BLANK_LINES.finditer(text):
        note = f"{found[0].count(chr(10)) - 1} blank lines"
        parts += [html.escape(text[end : found.start()]), f'\n<span class="fold">⋯ {note} ⋯</span>\n']
        end = found.end()
    return "".join([*parts, html.escape(text[end:])])


def _durations(durations: Sequence[Duration]) -> list[str]:
    if not durations:
        return []
    rows = [[duration.job, format_seconds(duration.seconds)] for duration in durations]
    rows.append(["together", format_seconds(sum(duration.seconds for duration in durations))])
    return ["<h2>Time</h2>", table(["job", "h:mm:ss"], rows)]


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
