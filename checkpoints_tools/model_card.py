"""README.md of an exported model: what it is, and where its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints_tools.hf_config import ARCHITECTURE_CLASS, DIFFUSION_ARCHITECTURES
from checkpoints_tools.mcore_folder import Contract
from megatron_dllm import checkpoint_folder as folders

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


def model_card(checkpoint: Path, contract: Contract, architecture: str, dtype_name: str) -> str:
    """Write the card.

    Args:
        checkpoint: the folder that was converted.
        contract: its contract.json.
        architecture: of the export.
        dtype_name: of the export.
    """
    content = contract.content
    is_diffusion = architecture in DIFFUSION_ARCHITECTURES
    has_bias = contract.model.is_moe and contract.model.moe_router_enable_expert_bias
    rows = [
        ("Architecture", f"{ARCHITECTURE_CLASS[architecture]} ({architecture})"),
        ("Weights", f"{dtype_name}, expert_bias float32" if has_bias else dtype_name),
        ("Prediction", "position i predicts token i" if contract.is_diffusion else "position i predicts token i + 1"),
        ("Block size", str(contract.block_size)),
        ("Context length", str(content["contract"]["context_length"])),
        ("Mask token id", str(contract.model.mask_token_id)),
        ("Checkpoint", str(checkpoint.absolute())),
        ("Stage", str(content.get("stage"))),
        ("Optimizer steps", str(content.get("step"))),
        ("Document tokens trained on", str(content.get("consumed_tokens"))),
    ]
    if content.get("source"):
        rows.append(("Converted from", str(content["source"])))
    run_folder = checkpoint.absolute().parent.parent
    if (run_folder / "config.yaml").is_file():
        rows.append(("Recipe", str(run_folder / "config.yaml")))
    tags = ["block-diffusion"] * is_diffusion + ["mixture-of-experts"] * contract.model.is_moe
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation",
             f"tags: [{', '.join(tags)}]", "---", "",
             f"# {run_folder.name if content.get('step') else checkpoint.absolute().name}", "", "## Provenance", "",
             "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    lines += _validation_lines(checkpoint) + _merge_lines(checkpoint)
    use = _USE.format(block_size=contract.block_size) if architecture == "llada2_moe" else ""
    return "\n".join(lines) + "\n" + use


def _validation_lines(checkpoint: Path) -> list[str]:
    if not (checkpoint / folders.VALIDATION).is_file():
        return []
    validation: dict[str, Any] = folders.read_json(checkpoint / folders.VALIDATION)
    bits = validation.get("bits_per_byte") or {}
    rows = [f"| {size} | {value:.4f} | {bits[size]:.4f} |" if size in bits else f"| {size} | {value:.4f} | |"
            for size, value in validation["elbo"].items()]
    return ["", "## Validation", "", "| block size | ELBO (nats per token) | bits per byte |", "|---|---|---|", *rows]


def _merge_lines(checkpoint: Path) -> list[str]:
    if not (checkpoint / PROVENANCE).is_file():
        return []
    provenance = folders.read_json(checkpoint / PROVENANCE)
    rows = [f"| {entry['checkpoint']} | {entry['weight']:.4f} | {entry.get('elbo')} |"
            for entry in provenance["inputs"]]
    return ["", "## Merge", "", f"Weighted mean ({provenance['weights']}) of:", "",
            "| checkpoint | weight | ELBO |", "|---|---|---|", *rows]
