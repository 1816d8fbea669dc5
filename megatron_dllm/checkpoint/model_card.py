"""README.md of an exported model: what it is, where its weights come from, how it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.meta import CheckpointMeta
from megatron_dllm.checkpoint.stored_model import StoredModel
from megatron_dllm.checkpoint.validation import Validation, read_validation
from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS, DIFFUSION_ARCHITECTURES
from megatron_dllm.hf.export_limits import as_exported
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles, chat_template
from megatron_dllm.hf.usage import usage
from megatron_dllm.run.names import CHECKPOINTS, CONFIG

PROVENANCE = "provenance.json"


def model_card(stored: StoredModel, architecture: str, dtype_name: str, tokenizer: Path) -> str:
    """Write the card; runs and folders are named without their place on this machine.

    Args:
        stored: the checkpoint that was converted.
        architecture: of the export.
        dtype_name: of the export.
        tokenizer: the folder of the export, for what its tokenizer has.
    """
    checkpoint, model, meta = stored.folder.absolute(), stored.model, stored.meta
    tags = ["block-diffusion", "custom_code"] * (architecture in DIFFUSION_ARCHITECTURES)
    tags += ["mixture-of-experts"] * model.is_moe
    provenance = _provenance(checkpoint)
    own_run = _run_folder(checkpoint)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {own_run.name if own_run else checkpoint.name}",
        "",
        "## Model",
        "",
        *_table(_model_rows(stored, architecture, dtype_name)),
        "",
        "## Provenance",
        "",
        *_table(_history_rows(checkpoint, meta, provenance)),
    ]
    lines += _validation_lines(read_validation(checkpoint)) + (_merge_lines(provenance) if provenance else [])
    return (
        "\n".join(lines)
        + "\n"
        + usage(
            architecture,
            meta.semantics.block_size,
            model.mask_token_id,
            has_chat_template=chat_template(tokenizer) is not None,
            has_tokenizer=TokenizerFiles(tokenizer).exists,
        )
    )


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _model_rows(stored: StoredModel, architecture: str, dtype_name: str) -> list[tuple[str, str]]:
    model, semantics = stored.model, stored.meta.semantics
    has_bias = model.is_moe and as_exported(model, architecture).moe_router_enable_expert_bias
    if not stored.meta.is_diffusion:
        prediction, trained = "position i predicts token i + 1", "1 (from left to right)"
    else:
        prediction, trained = "position i predicts token i", str(semantics.block_size)
    if not stored.meta.is_diffusion and architecture in DIFFUSION_ARCHITECTURES:
        prediction += "; the class decodes blocks, which these weights have not learnt yet"
    rows = [
        ("Architecture", f"{ARCHITECTURE_CLASS[architecture]} ({architecture})"),
        ("Weights", f"{dtype_name}, expert_bias float32" if has_bias else dtype_name),
        ("Prediction", prediction),
        ("Block size", trained),
        ("Context length", str(semantics.context_length)),
    ]
    is_used = stored.meta.is_diffusion or architecture in DIFFUSION_ARCHITECTURES
    return rows + [("Mask token id", str(model.mask_token_id))] * is_used


def _history_rows(checkpoint: Path, meta: CheckpointMeta, provenance: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What is known of how the weights came about; steps and tokens count from the start of the run."""
    position = meta.position
    rows = [("Checkpoint", _name(checkpoint))]
    if position.stage is not None:
        rows.append(("Stage", position.stage))
    if position.step:
        newest = " (of the newest that went into the merge)" if provenance else ""
        rows.append((f"Optimizer steps of the run{newest}", str(position.step)))
        rows.append((f"Document tokens of the run{newest}", str(position.consumed_tokens)))
    if meta.provenance.source:
        rows.append(("Converted from", Path(meta.provenance.source).name))
    run = _run_folder(Path(provenance["inputs"][0]["checkpoint"]) if provenance else checkpoint)
    if run is not None and (run / CONFIG).is_file():
        rows.append(("Recipe", f"{run.name}/{CONFIG}"))
    return rows


def _name(checkpoint: Path) -> str:
    """A run's checkpoint by run and step, any other folder by its own name."""
    run = _run_folder(checkpoint)
    return f"{run.name}/{checkpoint.name}" if run is not None else checkpoint.name


def merge_card(name: str, provenance: dict[str, Any]) -> str:
    """Write the card of a mean of Hugging Face folders: what went in.

    Args:
        name: of the result.
        provenance: its provenance.json.
    """
    return "\n".join([f"# {name}", *_merge_lines(provenance)]) + "\n"


def _run_folder(checkpoint: Path) -> Path | None:
    """The run that saved a checkpoint, or None for one that a tool wrote."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def _provenance(checkpoint: Path) -> dict[str, Any] | None:
    path = checkpoint / PROVENANCE
    if not path.is_file():
        return None
    provenance = read_json(path)
    if not provenance.get("inputs") or not all(
        isinstance(entry, dict) and {"checkpoint", "weight"} <= entry.keys() for entry in provenance["inputs"]
    ):
        raise ValueError(f"{path} is damaged (no inputs); merge the checkpoints again.")
    return provenance


def _validation_lines(validation: Validation | None) -> list[str]:
    if validation is None:
        return []
    bits = validation.bits_per_byte
    rows = [
        f"| {size} | {value:.4f} | {bits[size]:.4f} |" if size in bits else f"| {size} | {value:.4f} | |"
        for size, value in sorted(validation.nats_per_token.items(), key=lambda item: (len(item[0]), item[0]))
    ]
    return ["", "## Validation", "", "| block size | ELBO (nats per token) | bits per byte |", "|---|---|---|", *rows]


def _merge_lines(provenance: dict[str, Any]) -> list[str]:
    rows = [
        f"| {_name(Path(entry['checkpoint']))} | {entry['weight']:.4f} | {_number(entry.get('elbo'))} |"
        for entry in provenance["inputs"]
    ]
    return [
        "",
        "## Merge",
        "",
        f"Weighted mean ({provenance.get('weights')}) of:",
        "",
        "| checkpoint | weight | ELBO |",
        "|---|---|---|",
        *rows,
    ]


def _number(elbo: Any) -> str:
    return f"{elbo:.4f}" if isinstance(elbo, (int, float)) else ""
