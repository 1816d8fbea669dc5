"""Decode with an exported folder, once through transformers and once through this project: the tokens are the same.

    python -m examples.decode_export [FOLDER] [--prompt TEXT] [--max_new_tokens 24]

FOLDER is what checkpoints_tools.mcore_to_hf writes of a diffusion model (runs/demo/hf after `make demo`). Without
one, a tiny model with random weights is exported first: its text is noise, but the whole way is the real one. Takes
under a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer

from benchmarks.synthetic import write_synthetic
from benchmarks.tiny_run import MODEL
from checkpoints_tools import hf_to_mcore, mcore_to_hf
from examples.corpus import VOCAB_SIZE, documents_of, make_tokenizer
from megatron_dllm.config import GenerateConfig
from megatron_dllm.generate import generate

BLOCK_SIZE = 8
THRESHOLD = 0.9


def export_random_model(folder: Path) -> Path:
    """Write a tiny Ling with random weights, convert it, and export it as a LLaDA2; returns the export."""
    write_synthetic(folder / "ling", replace(MODEL, vocab_size=VOCAB_SIZE))
    make_tokenizer(documents_of([]), folder / "ling")
    hf_to_mcore.convert(folder / "ling", folder / "checkpoint")
    mcore_to_hf.convert(folder / "checkpoint", folder / "export", architecture="llada2_moe", dtype="fp32")
    return folder / "export"


def decode_with_transformers(export: Path, prompt: str, max_new_tokens: int) -> list[int]:
    """The new tokens that the exported folder's own code gives."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype="auto")
    prompt_ids = Tokenizer.from_file(str(export / "tokenizer.json")).encode(prompt, add_special_tokens=False).ids
    tokens = model.generate(
        torch.tensor([prompt_ids]), block_size=BLOCK_SIZE, max_new_tokens=max_new_tokens, threshold=THRESHOLD
    )
    return tokens[0, len(prompt_ids) :].tolist()


def decode_with_megatron(export: Path, prompt: str, max_new_tokens: int) -> list[int]:
    """The new tokens that this project's decoding gives."""
    config = GenerateConfig(
        checkpoint=str(export), prompt=prompt, block_size=BLOCK_SIZE, threshold=THRESHOLD, max_new_tokens=max_new_tokens
    )
    return generate(config)[0].generation.generated_ids


def main(words: list[str] | None = None) -> int:
    """Decode twice and compare; returns the exit code: 1 where the tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="an export; none: a tiny random one")
    parser.add_argument("--prompt", default="The mask is", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    arguments = parser.parse_args(words)
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        export = arguments.folder or export_random_model(Path(temporary))
        theirs = decode_with_transformers(export, arguments.prompt, arguments.max_new_tokens)
        ours = decode_with_megatron(export, arguments.prompt, arguments.max_new_tokens)
        tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    for name, tokens in (("transformers", theirs), ("megatron_dllm", ours)):
        console.print(f"{name}: {len(tokens)} tokens {tokens[:8]} ...", markup=False)
        console.print(repr(tokenizer.decode(tokens)), markup=False)
    console.print("the same tokens" if theirs == ours else "the tokens differ")
    return int(theirs != ours)


if __name__ == "__main__":
    raise SystemExit(main())
