"""Models that transformers makes, of every family: the same logits here, back to the same bytes, and on as diffusion.

Runs under transformers 5 and 4.57: make test-transformers4
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.synthetic import write_synthetic
from benchmarks.tiny_run import MODEL, checkpoints_of, read_steps, run_config, train_ranks, write_corpus
from checkpoints_tools import extend_vocab, hf_to_mcore, mcore_to_hf
from checkpoints_tools.compare import compare
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import CheckpointConfig, DecodingConfig, ModelConfig, ParallelConfig
from megatron_dllm.diffusion.decode import DecodingContract, decode
from megatron_dllm.hf.safetensors_io import SafetensorsFolder
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED
from tests.golden.earlier_run import CHECKPOINT, FOLDER, STEPS, earlier_config, steps_of
from tests.integration.ours import load_ours, logits_of
from tests.tiny_models import MODELS, as_qwen3

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
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Name of the case: class in transformers without its last part, and what it has beyond SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 5e5}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama 3.1": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen2 yarn": ("Qwen2", {"rope_theta": 1e6, "rope_scaling": YARN}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "sliding_window": 4, "use_sliding_window": False}),
    "mistral": ("Mistral", {"sliding_window": None, **WIDE}),
    "mistral, window as long as any text": ("Mistral", {"sliding_window": 128}),
    "mixtral": ("Mixtral", {"rope_theta": 1e6, **EXPERTS}),
    "mixtral tied": ("Mixtral", {"tie_word_embeddings": True, **EXPERTS, **WIDE}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "olmoe, normalised": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True}),
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
    kept = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    for name in kept:
        assert getattr(again.config, name) == getattr(converted.original.config, name), name


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
    assert torch.equal(logits_of(_loaded_directly(converted), _ids(), blocks), expected)


def _loaded_directly(converted: Converted) -> Any:
    """Our model with the weights of the diffusion folder, as generate and evaluate load it."""
    from megatron_dllm.inference.load import load_hf_weights
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    model = build_model(read_stored_model(converted.folder / "again").model, ParallelConfig(), Groups.current())
    load_hf_weights(converted.folder / "diffusion", model)
    return model.eval()


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


# Layers and experts of a large model of every family, and how many tensors it has; the shapes are cut down.
_NARROW = {"head_dim": 2, "moe_intermediate_size": 2, "norm_topk_prob": True}
LARGE: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama 3 70B": ("Llama", {"num_hidden_layers": 80}, 723),
    "Qwen2.5 72B": ("Qwen2", {"num_hidden_layers": 80}, 963),
    "Qwen3 32B": ("Qwen3", {"num_hidden_layers": 64, "head_dim": 2}, 707),
    "Mistral Large": ("Mistral", {"num_hidden_layers": 88, "sliding_window": None}, 795),
    "OLMoE 7B": ("Olmoe", {"num_hidden_layers": 16, "num_experts": 64, "norm_topk_prob": False}, 3219),
    "Mixtral 8x22B": ("Mixtral", {"num_hidden_layers": 56, "num_local_experts": 8, "num_experts_per_tok": 2}, 1739),
    "Qwen3 30B A3B": ("Qwen3Moe", {"num_hidden_layers": 48, "num_experts": 128, **_NARROW}, 18867),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (num > 10_000)) for name, (_, _, num) in LARGE.items()]
)
def test_a_large_model_converts_by_its_real_names(name: str, tmp_path: Path) -> None:
    import transformers

    family, changes, num_tensors = LARGE[name]
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 4}
    config = getattr(transformers, f"{family}Config")(**SIZES | small | changes)
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore", 2)
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    names = [SafetensorsFolder(tmp_path / folder).tensors.keys() for folder in ("hf", "back")]
    assert names[0] == names[1] and len(names[0]) == num_tensors
    assert compare(tmp_path / "hf", tmp_path / "back").is_equal


def test_a_qwen2_with_biases_trains_on_two_tensor_ranks(tmp_path: Path) -> None:
    """From a vocabulary that two ranks do not divide to a diffusion model that transformers decodes."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SIZES | {"vocab_size": 127, "max_position_embeddings": 64})
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "hf")
    write_corpus(tmp_path / "corpus")
    words = [
        "experiment=convert",
        f"data.train={tmp_path / 'corpus'}",
        f"run.root={tmp_path / 'runs'}",
        "schedule.num_tokens=100000",
        "schedule.global_batch_size=4",
        "schedule.micro_batch_size=2",
        "parallel={tensor_model_parallel_size: 2, sequence_parallel: true}",
        "logging={interval_steps: 1, tensorboard: false}",
    ]
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "odd", 2)
    with pytest.raises(ValueError, match=r"must divide model.vocab_size \(127\); extend_vocab makes 128 rows of them"):
        compose_train_config([*words, f"checkpoint.load={tmp_path / 'odd'}"]).validate(2)
    extend_vocab.convert(tmp_path / "odd", tmp_path / "even", 128)
    run = compose_train_config([*words, f"checkpoint.load={tmp_path / 'even'}"])
    assert train_ranks(2, run, 2) == [EXIT_PREEMPTED] * 2
    assert [record["step"] for record in read_steps(run)] == [1, 2]

    mcore_to_hf.convert(tmp_path / "runs" / "convert", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    biases = [value for name, value in exported.named_parameters() if name.endswith("proj.bias")]
    assert len(biases) == 2 * 3 and all(bool(bias.any()) for bias in biases), "they begin as zeros"
    assert exported.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8).shape[1] > 3


_SMALL = as_qwen3(replace(MODEL, ffn_hidden_size=MODEL.moe_ffn_hidden_size), "qwen3_moe")
SHARED: dict[str, tuple[ModelConfig, bool]] = {
    "norms over all heads": (replace(_SMALL, family="olmoe", qk_layernorm_spans_heads=True), True),
    "biases": (replace(MODELS["qwen2"], vocab_size=MODEL.vocab_size, max_position_embeddings=512), False),
}


@pytest.mark.parametrize("name", SHARED)
def test_two_tensor_ranks_train_what_one_trains(name: str, tmp_path: Path) -> None:
    """Loss and gradient norm of the first steps, which hold the gradients of what the ranks share, and its update."""
    write_corpus(tmp_path / "corpus")
    model, is_sequence_parallel = SHARED[name]
    write_synthetic(tmp_path / "hf", model, dtype=torch.float32)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    start = CheckpointConfig(load=str(tmp_path / "mcore"))
    two = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=is_sequence_parallel)
    steps = []
    for run, layout in (("one", ParallelConfig()), ("two", two)):
        config = run_config(tmp_path, run, layout, model=model, checkpoint=start)
        assert set(train_ranks(layout.tensor_model_parallel_size, config, 3)) == {EXIT_PREEMPTED}
        steps.append([(record["loss"], record["grad_norm"]) for record in read_steps(config)])
    assert len(steps[0]) == 3
    torch.testing.assert_close(torch.tensor(steps[1]), torch.tensor(steps[0]), rtol=1e-4, atol=0.0)


def test_a_run_goes_on_with_a_larger_vocabulary_and_its_optimizer(tmp_path: Path) -> None:
    """Two more rows among 128 cost at most some hundredths of a nat; everything else is the run's own."""
    write_corpus(tmp_path / "corpus")
    config = earlier_config(tmp_path)
    config = replace(config, model=replace(config.model, vocab_size=130))
    extend_vocab.convert(FOLDER / CHECKPOINT, checkpoints_of(config) / CHECKPOINT, 130, keeps_optimizer=True)
    assert train_ranks(1, config) == [0]
    _, *expected = (FOLDER / STEPS).read_text(encoding="utf-8").splitlines()
    found = steps_of(config, int(CHECKPOINT.removeprefix("step_")) + 1)
    assert len(found) == len(expected)
    for mine, theirs in zip((line.split() for line in found), (line.split() for line in expected), strict=True):
        assert (mine[0], mine[1], mine[4]) == (theirs[0], theirs[1], theirs[4])
        assert float(mine[2]) == pytest.approx(float(theirs[2]), rel=0.02)
