"""The nine commands of docs/first_conversion.md, as they stand there, on a small model that transformers has saved."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.house.mentions import ROOT

PAGE = ROOT / "docs" / "first_conversion.md"


def commands_of(page: str) -> list[str]:
    """The indented blocks of the section, each a command of a shell."""
    section = page.split("## Nine commands\n")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^    .+\n)+", section, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]


def make_model(folder: Path, texts: list[str]) -> None:
    """A Qwen3-MoE with random weights and a tokenizer that has no mask token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end, alphabet = "<|endoftext|>", pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def test_the_page_has_nine_commands_and_no_yaml() -> None:
    commands = commands_of(PAGE.read_text())
    assert len(commands) == 9
    assert not [command for command in commands if "yaml" in command or "--config-dir" in command]


@pytest.mark.slow
def test_the_commands_lead_from_a_hugging_face_folder_to_another(tmp_path: Path) -> None:
    pages = sorted((ROOT / "docs").glob("*.md"))
    for index, page in enumerate(pages):
        part = tmp_path / ("held_out" if index % 4 == 0 else "text")
        part.mkdir(exist_ok=True)
        (part / f"{page.stem}.txt").write_text(page.read_text())
    make_model(tmp_path / "my_model", [page.read_text() for page in pages])
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),  # another transformers, say
        "OMP_NUM_THREADS": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    outputs = []
    for command in commands_of(PAGE.read_text()):
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-4000:]}"
        outputs.append(done.stdout)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["architectures"] == ["SDARMoeForCausalLM"]
    assert "SDARMoeForCausalLM" in outputs[6]
    measured = json.loads((tmp_path / "merged" / "validation.json").read_text())
    assert set(measured["elbo"]) == {"4"}
    (text,) = (json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines())
    assert text["num_generated_tokens"] > 0
    assert "data:image" in (tmp_path / "runs" / "first" / "report.html").read_text()
    trained = (tmp_path / "runs" / "first" / "config.yaml").read_text()
    assert "family: qwen3_moe" in trained and "mask_token_id: 400" in trained and "context_length: 256" in trained
