"""Models that transformers makes, of every family: the same logits here, back to the same bytes, and on as diffusion.

Runs under transformers 5 and 4.57: make test-transformers4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from checkpoints_tools import hf_to_mcore, mcore_to_hf
from checkpoints_tools.compare import compare
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.config import DecodingConfig, ModelConfig
from megatron_dllm.diffusion.decode import DecodingContract, decode
from tests.integration.ours import load_ours, logits_of

LENGTH = 23
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
WIDE = {"head_dim": 16}  # 4 heads of 16 features in a model of 48
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Name of the case: class in transformers without its last part, and what it has beyond SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 5e5}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "sliding_window": 4, "use_sliding_window": False}),
    "mistral": ("Mistral", {"sliding_window": None, **WIDE}),
    "mistral, window as long as any text": ("Mistral", {"sliding_window": 128}),
    "mixtral": ("Mixtral", {"rope_theta": 1e6, **EXPERTS}),
    "mixtral tied": ("Mixtral", {"tie_word_embeddings": True, **EXPERTS, **WIDE}),
}


class Converted(NamedTuple):
    """A model of transformers, and the folders `hf`, `mcore`, `back` and `diffusion` made of it."""

    original: Any
    model: ModelConfig
    folder: Path


@pytest.fixture(scope="module", params=CASES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> Converted:
    """Every case in turn."""
    import transformers

    name, changes = CASES[request.param]
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    original = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES | changes))
    with torch.no_grad():
        for key, parameter in original.named_parameters():
            if "norm" in key or key.endswith("bias"):  # which begin as ones and zeros
                parameter.add_(0.2 * torch.randn_like(parameter))
    original = original.float().eval()
    original.save_pretrained(folder / "hf")
    hf_to_mcore.convert(folder / "hf", folder / "mcore", 2)
    mcore_to_hf.convert(folder / "mcore", folder / "back")
    mcore_to_hf.convert(folder / "mcore", folder / "diffusion", "megatron_dllm")
    return Converted(original, read_stored_model(folder / "mcore").model, folder)


def _ids() -> Tensor:
    return torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_logits_equal_those_of_transformers(converted: Converted) -> None:
    expected = converted.original(_ids()).logits
    actual = logits_of(load_ours(converted.folder / "mcore"), _ids(), list(range(LENGTH)))
    assert float((actual - expected).abs().max()) <= 1e-5
    assert float(expected.std()) > 0.3, "a model whose parts do not show"


@torch.no_grad()
def test_the_way_back_gives_the_same_bytes_and_class(converted: Converted) -> None:
    assert compare(converted.folder / "hf", converted.folder / "back").is_equal
    again = type(converted.original).from_pretrained(converted.folder / "back")
    assert torch.equal(again(_ids()).logits, converted.original(_ids()).logits)
    kept = ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    for name in kept:
        if hasattr(converted.original.config, name):
            assert getattr(again.config, name) == getattr(converted.original.config, name) or name == "head_dim"


@torch.no_grad()
def test_the_diffusion_class_has_the_same_logits(converted: Converted) -> None:
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(
        converted.folder / "diffusion", trust_remote_code=True, dtype=torch.float32
    ).eval()
    ours = load_ours(converted.folder / "mcore")
    for blocks in ([0] * LENGTH, list(range(LENGTH)), [i // 4 for i in range(LENGTH)]):
        block = torch.tensor(blocks)
        mask = (block.unsqueeze(0) <= block.unsqueeze(1))[None, None]
        actual, expected = exported(_ids(), attention_mask=mask).logits, logits_of(ours, _ids(), blocks)
        assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    hf_to_mcore.convert(converted.folder / "diffusion", converted.folder / "again", 2)
    assert compare(converted.folder / "again", converted.folder / "mcore").is_equal


def test_the_diffusion_class_decodes_our_tokens(converted: Converted) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_dllm.inference.cached_forward import CachedForward

    exported = AutoModelForCausalLM.from_pretrained(
        converted.folder / "diffusion", trust_remote_code=True, dtype=torch.float32
    ).eval()
    forward = CachedForward(load_ours(converted.folder / "mcore"))
    contract = DecodingContract(8, 128, 2, (1,))
    for length in (1, 13):
        prompt = _ids()[0, :length].tolist()
        expected = decode(forward, prompt, DecodingConfig(max_new_tokens=21, threshold=0.3), contract)
        actual = exported.generate(torch.tensor([prompt]), block_size=8, max_new_tokens=21, threshold=0.3)
        assert actual[0].tolist() == prompt + expected.generated_ids


def test_fused_experts_of_a_mixtral(tmp_path: Path) -> None:
    """As transformers 5 saves them where its original format is turned off."""
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.MixtralConfig(**SIZES | EXPERTS)
    original = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    original.save_pretrained(tmp_path / "each")
    original.save_pretrained(tmp_path / "fused", save_original_format=False)
    for form in ("each", "fused"):
        hf_to_mcore.convert(tmp_path / form, tmp_path / f"{form}_mcore", 2)
    assert compare(tmp_path / "each_mcore", tmp_path / "fused_mcore").is_equal
