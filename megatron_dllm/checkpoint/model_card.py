"""README.md of an exported model: what it is, and where its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.stored_model import StoredModel
from megatron_dllm.checkpoint.validation import Validation, read_validation
from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS, DIFFUSION_ARCHITECTURES
from megatron_dllm.run.names import CHECKPOINTS, CONFIG

PROVENANCE = "provenance.json"

_USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(PATH)
prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(prompt, block_size={block_size}, max_new_tokens=128)[0]))
```

`generate` decodes block by block ({block_size} tokens were denoised together in training).
Position i predicts token i; `attention_mask=None` means every token sees every other.
"""


def model_card(stored: StoredModel, architecture: str, dtype_name: str) -> str:
    """Write the card.

    Args:
        stored: the checkpoint that was converted.
        architecture: of the export.
        dtype_name: of the export.
    """
    checkpoint, model, meta = stored.folder, stored.model, stored.meta
    semantics, position = meta.semantics, meta.position
    is_diffusion = architecture in DIFFUSION_ARCHITECTURES
    has_bias = model.is_moe and model.moe_router_enable_expert_bias
    provenance = _provenance(checkpoint)
    rows = [
        ("Architecture", f"{ARCHITECTURE_CLASS[architecture]} ({architecture})"),
        ("Weights", f"{dtype_name}, expert_bias float32" if has_bias else dtype_name),
        ("Prediction", "position i predicts token i" if meta.is_diffusion else "position i predicts token i + 1"),
        ("Block size", str(semantics.block_size)),
        ("Context length", str(semantics.context_length)),
        ("Mask token id", str(model.mask_token_id)),
        ("Checkpoint", str(checkpoint.absolute())),
        ("Stage", str(position.stage)),
        ("Optimizer steps", str(position.step)),
        ("Document tokens trained on", str(position.consumed_tokens)),
    ]
    if meta.provenance.source:
        rows.append(("Converted from", meta.provenance.source))
    run = _run_folder(Path(provenance["inputs"][0]["checkpoint"]) if provenance else checkpoint.absolute())
    if run is not None and (run / CONFIG).is_file():
        rows.append(("Recipe", str(run / CONFIG)))
    tags = ["block-diffusion"] * is_diffusion + ["mixture-of-experts"] * model.is_moe
    own_run = _run_folder(checkpoint.absolute())
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {own_run.name if own_run else checkpoint.absolute().name}",
        "",
        "## Provenance",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    lines += _validation_lines(read_validation(checkpoint)) + (_merge_lines(provenance) if provenance else [])
    use = _USE.format(block_size=semantics.block_size) if architecture == "llada2_moe" else ""
    return "\n".join(lines) + "\n" + use


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
        f"| {entry['checkpoint']} | {entry['weight']:.4f} | {entry.get('elbo')} |" for entry in provenance["inputs"]
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
