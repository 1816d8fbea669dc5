"""Converted weights compute what the original computes, on every layout, and decode the same tokens.

Runs under transformers 5 and 4.57: make test-transformers4
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ranks import run_ranks
from benchmarks.synthetic import write_synthetic
from benchmarks.tiny_run import MODEL, checkpoints_of, run_config, train_ranks, write_corpus
from checkpoints_tools import hf_to_mcore, mcore_to_hf
from checkpoints_tools.compare import compare
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.config import CheckpointConfig, DecodingConfig, ModelConfig, ParallelConfig, RotaryScalingConfig
from megatron_dllm.diffusion.decode import DecodingContract, decode
from megatron_dllm.hf.export_config import to_hf_config
from megatron_dllm.hf.name_table import is_fp32
from megatron_dllm.hf.safetensors_io import SafetensorsFolder
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED
from tests.integration.ours import load_ours, logits_of
from tests.reference_model import expected_logits, random_weights, tiny_model
from tests.tiny_models import as_qwen3

LENGTH = 23
# Block of every position: what is visible is every token of one's own block and of earlier ones.
MASKS = {"full": [0] * LENGTH, "causal": list(range(LENGTH)), "block-causal": [i // 4 for i in range(LENGTH)]}


def _visible(blocks: list[int]) -> Tensor:
    block = torch.tensor(blocks)
    return block.unsqueeze(0) <= block.unsqueeze(1)


def _ids(model: ModelConfig, rows: int = 2) -> Tensor:
    return torch.randint(0, model.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def llada2(tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """A tiny Ling: its sizes, its weights by HF name, and a folder with `hf`, `mcore` and the export `llada2`."""
    folder = tmp_path_factory.mktemp("ling")
    model = tiny_model(moe_shared_expert_intermediate_size=48)
    weights = random_weights(model)
    (folder / "hf").mkdir()
    save_file(weights, folder / "hf" / "model.safetensors")
    config = to_hf_config(model, "bailing_moe", "float32") | {"mask_token_id": model.mask_token_id}
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    hf_to_mcore.convert(folder / "hf", folder / "mcore")
    mcore_to_hf.convert(folder / "mcore", folder / "llada2", "llada2_moe")
    return model, weights, folder


def _from_pretrained(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize("mask", MASKS)
def test_ling_logits_equal_the_reference(llada2: tuple[ModelConfig, dict[str, Tensor], Path], mask: str) -> None:
    model, weights, folder = llada2
    ids = _ids(model)
    positions = torch.arange(LENGTH).expand_as(ids)
    expected = expected_logits(model, weights, ids, positions, _visible(MASKS[mask]).expand(2, -1, -1))
    actual = logits_of(load_ours(folder / "mcore"), ids, MASKS[mask])
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_exported_model_equals_the_reference(llada2: tuple[ModelConfig, dict[str, Tensor], Path], mask: str) -> None:
    model, weights, folder = llada2
    exported = _from_pretrained(folder / "llada2", dtype=torch.float32)
    ids = _ids(model)
    positions = torch.arange(LENGTH).expand_as(ids)
    visible = _visible(MASKS[mask])
    expected = expected_logits(model, weights, ids, positions, visible.expand(2, -1, -1))
    added = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~visible, float("-inf"))
    masks = [visible[None, None], added] + ([None, torch.ones_like(ids)] if mask == "full" else [])
    for given in masks:
        actual = exported(ids, attention_mask=given).logits
        assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_exported_model_keeps_the_bits_of_the_bias(llada2: tuple[ModelConfig, dict[str, Tensor], Path]) -> None:
    _, weights, folder = llada2
    exported = _from_pretrained(folder / "llada2", dtype=torch.bfloat16)
    names = [name for name in weights if is_fp32(name)]
    for state in (exported.state_dict(), exported.to(torch.bfloat16).state_dict(), exported.half().state_dict()):
        assert all(state[name].dtype == torch.float32 and torch.equal(state[name], weights[name]) for name in names)
    assert exported.lm_head.weight.dtype == torch.float16


def test_exported_model_saves_and_loads_again(
    llada2: tuple[ModelConfig, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    model, weights, folder = llada2
    _from_pretrained(folder / "llada2", dtype=torch.float32).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in saved.items()) and saved.keys() == weights.keys()
    again = _from_pretrained(tmp_path / "saved")
    ids = _ids(model)
    assert torch.equal(again(ids).logits, _from_pretrained(folder / "llada2", dtype=torch.float32)(ids).logits)


def test_exported_model_trains(llada2: tuple[ModelConfig, dict[str, Tensor], Path]) -> None:
    model, _, folder = llada2
    exported = _from_pretrained(folder / "llada2", dtype=torch.float32).train()
    ids = _ids(model)
    exported(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in exported.named_parameters()}
    assert all(
        gradient is not None and bool(torch.isfinite(gradient).all())
        for name, gradient in gradients.items()
        if ".experts." not in name
    )


@pytest.mark.parametrize(
    ("block_size", "settings"),
    [
        (8, {"threshold": 0.3}),
        (4, {"threshold": 0.95}),
        (8, {"threshold": 0.9, "min_tokens_per_step": 3}),
        (1, {}),
        (64, {}),
        (8, {"threshold": 0.5, "temperature": 0.8, "seed": 7}),
        (8, {"threshold": 0.5, "temperature": 1.2, "top_p": 0.7, "top_k": 20, "seed": 8}),
    ],
)
def test_exported_generate_equals_ours(
    llada2: tuple[ModelConfig, dict[str, Tensor], Path], block_size: int, settings: dict[str, Any]
) -> None:
    from megatron_dllm.inference.cached_forward import CachedForward

    model, _, folder = llada2
    exported = _from_pretrained(folder / "llada2", dtype=torch.float32)
    module = load_ours(folder / "mcore")
    generator = torch.Generator().manual_seed(11)
    for length in (1, 3, 8, 13, 16):
        prompt = torch.randint(0, 90, (length,), generator=generator).tolist()
        contract = DecodingContract(
            block_size, model.max_position_embeddings, model.mask_token_id, (model.eos_token_id,)
        )
        expected = decode(CachedForward(module), prompt, DecodingConfig(max_new_tokens=21, **settings), contract)
        actual = exported.generate(torch.tensor([prompt]), block_size=block_size, max_new_tokens=21, **settings)
        assert actual[0].tolist() == prompt + expected.generated_ids
        assert model.mask_token_id not in actual


def test_exported_generate_stops_like_ours(llada2: tuple[ModelConfig, dict[str, Tensor], Path]) -> None:
    from megatron_dllm.inference.cached_forward import CachedForward

    model, _, folder = llada2
    exported = _from_pretrained(folder / "llada2", dtype=torch.float32)
    prompt = [5, 6, 7]
    free = exported.generate(torch.tensor([prompt]), block_size=8, max_new_tokens=30, threshold=0.3)[0].tolist()
    eos = free[15]
    contract = DecodingContract(8, model.max_position_embeddings, model.mask_token_id, (eos,))
    expected = decode(
        CachedForward(load_ours(folder / "mcore")), prompt, DecodingConfig(max_new_tokens=30, threshold=0.3), contract
    )
    actual = exported.generate(torch.tensor([prompt]), block_size=8, max_new_tokens=30, threshold=0.3, eos_token_id=eos)
    assert expected.stop_reason == "eos"
    assert actual[0].tolist() == prompt + expected.generated_ids == free[: free.index(eos, 3) + 1]


@pytest.mark.parametrize(
    ("prompt", "message"), [([[95, 3]], "mask token"), ([[1] * 512], "shorter"), ([[]], "must be prompts")]
)
def test_exported_generate_refuses(
    llada2: tuple[ModelConfig, dict[str, Tensor], Path], prompt: list[list[int]], message: str
) -> None:
    exported = _from_pretrained(llada2[2] / "llada2", dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        exported.generate(torch.tensor(prompt, dtype=torch.int64))


@pytest.mark.parametrize("is_normalised", [True, False])
@torch.no_grad()
def test_qwen3_moe_logits_equal_transformers(tmp_path: Path, one_rank: None, is_normalised: bool) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=is_normalised,
        max_position_embeddings=128,
        rope_theta=1e6,
        eos_token_id=1,
        pad_token_id=0,
        mlp_only_layers=[0],
        initializer_range=0.15,
    )
    _check_against_transformers(Qwen3MoeForCausalLM(config), tmp_path)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0}
        | {"beta_slow": 0.5, "attention_factor": 1.5},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=["yarn", "yarn_with_all_values", "llama3"],
)
@torch.no_grad()
def test_stretched_logits_equal_transformers(tmp_path: Path, one_rank: None, scaling: dict[str, Any]) -> None:
    from transformers import Qwen3ForCausalLM

    original = Qwen3ForCausalLM(_qwen3_config(rope_scaling=dict(scaling)))
    _check_against_transformers(original, tmp_path)
    assert read_stored_model(tmp_path / "mcore").model.rotary_scaling == RotaryScalingConfig.of(
        {"kind": scaling["rope_type"], **{key: value for key, value in scaling.items() if key != "rope_type"}}
    )


@pytest.mark.parametrize("is_tied", [True, False])
@torch.no_grad()
def test_qwen3_logits_equal_transformers(tmp_path: Path, one_rank: None, is_tied: bool) -> None:
    from transformers import Qwen3ForCausalLM

    _check_against_transformers(Qwen3ForCausalLM(_qwen3_config(tie_word_embeddings=is_tied)), tmp_path)


def _qwen3_config(**changes: Any) -> Any:
    from transformers import Qwen3Config

    torch.manual_seed(0)
    return Qwen3Config(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=1e6,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.15,
        **changes,
    )


def _check_against_transformers(original: Any, folder: Path) -> None:
    for name, parameter in original.named_parameters():
        if "norm" in name:
            parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter))
    original = original.float().eval()
    original.save_pretrained(folder / "hf")
    hf_to_mcore.convert(folder / "hf", folder / "mcore", 2)
    model = read_stored_model(folder / "mcore").model
    ids = _ids(model)
    expected = original(ids).logits
    actual = logits_of(load_ours(folder / "mcore"), ids, MASKS["causal"])
    assert float((actual - expected).abs().max()) <= 1e-5
    mcore_to_hf.convert(folder / "mcore", folder / "back", model.family)
    assert compare(folder / "hf", folder / "back").is_equal
    again = type(original).from_pretrained(folder / "back")
    assert torch.equal(again(ids).logits, expected)


LAYOUTS = {
    "TP2 x EP2": (
        2,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
            precision="bf16",
        ),
    ),
    "TP2 x PP2": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
            expert_tensor_parallel_size=2,
            precision="bf16",
        ),
    ),
}


def _load_and_save(source: str, target: str, layout: ParallelConfig, model: ModelConfig) -> None:
    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.checkpoint.saving import CheckpointWriter
    from megatron_dllm.config import RunConfig
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import initialize

    groups = initialize(layout, RunConfig(name="layouts"))
    module = build_model(model, layout, groups)
    load_weights(Path(source), [module])
    CheckpointWriter(Path(target), groups.data_context).save(1, [module], None, read_meta(Path(source)), {})


@pytest.mark.parametrize(
    ("family", "layout"),
    [("bailing_moe", "TP2 x EP2"), ("bailing_moe", "TP2 x PP2"), ("qwen3_moe", "TP2 x EP2"), ("qwen3", "TP2 x PP2")],
)
def test_round_trip_through_another_layout_is_exact(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny_model(num_layers=4, moe_shared_expert_intermediate_size=48)
    if family != "bailing_moe":
        model = as_qwen3(model, family)
    write_synthetic(tmp_path / "hf", model, max_shard_bytes=10**5)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    ranks, parallel = LAYOUTS[layout]
    run_ranks(_load_and_save, ranks, str(tmp_path / "mcore"), str(tmp_path / "checkpoints"), parallel, model)
    mcore_to_hf.convert(tmp_path / "checkpoints" / "step_0000001", tmp_path / "back", family)
    bits, expected = _bits(tmp_path / "back"), _bits(tmp_path / "hf")
    assert bits.keys() == expected.keys()
    assert all(torch.equal(bits[name], value) for name, value in expected.items())
    assert {value.element_size() for value in expected.values()} == ({2, 4} if family == "bailing_moe" else {2})


def _bits(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder as integers of its width, which tell -0 from 0."""
    integer = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
    return {
        name: value.view(integer[value.dtype])
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def test_a_run_remembers_what_it_was_converted_from(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    write_synthetic(tmp_path / "hf", MODEL, dtype=torch.float32)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    config = run_config(tmp_path, "run", checkpoint=CheckpointConfig(load=str(tmp_path / "mcore")))
    for step in (1, 2):
        assert train_ranks(1, config, 1) == [EXIT_PREEMPTED]
        meta = read_meta(checkpoints_of(config) / f"step_{step:07d}")
        assert (meta.position.step, meta.provenance.source) == (step, str(tmp_path / "hf"))


@pytest.mark.slow
def test_round_trip_with_the_real_number_of_tensors(tmp_path: Path) -> None:
    """Those of Ling-flash, the largest."""
    model = ModelConfig(
        num_layers=32,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        vocab_size=16,
        num_dense_layers=1,
        num_moe_experts=256,
        moe_ffn_hidden_size=2,
        moe_shared_expert_intermediate_size=2,
        moe_router_topk=8,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        mask_token_id=2,
        eos_token_id=0,
        pad_token_id=1,
    )
    write_synthetic(tmp_path / "hf", model, max_shard_bytes=10**5)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    expected, actual = SafetensorsFolder(tmp_path / "hf"), SafetensorsFolder(tmp_path / "back")
    assert len(expected.tensors) == 24_161
    assert {name: (t.dtype, t.shape) for name, t in actual.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.tensors.items()
    }
    bits, original = _bits(tmp_path / "back"), _bits(tmp_path / "hf")
    assert all(torch.equal(bits[name], value) for name, value in original.items())
