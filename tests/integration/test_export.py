"""An exported folder, loaded by transformers, computes and decodes what the checkpoint it was made of does.

Runs under transformers 5 and 4.57: make test-transformers4
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_tools import hf_to_mcore, mcore_to_hf
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.config import DecodingConfig, ModelConfig, RotaryScalingConfig
from megatron_dllm.diffusion.decode import DecodingContract, decode
from megatron_dllm.hf.export_config import to_hf_config
from megatron_dllm.hf.name_table import weight_map
from tests.integration.ours import load_ours, logits_of
from tests.integration.test_generate import write_tokenizer
from tests.reference_model import tiny_model
from tests.tiny_models import as_qwen3

LENGTH = 23
LLADA2 = tiny_model(moe_shared_expert_intermediate_size=24, family="llada2_moe")
SDAR_MOE = replace(as_qwen3(LLADA2, "sdar_moe"), rotary_base=1e6)
SDAR = replace(as_qwen3(LLADA2, "sdar"), rotary_base=1e6, tie_word_embeddings=True)
# Whatever a class of our own can have at once.
OWN = replace(
    SDAR_MOE,
    family="megatron_dllm",
    num_dense_layers=1,
    rotary_percent=0.5,
    add_qkv_bias=True,
    qk_layernorm_spans_heads=True,
)
MODELS = {
    "llada2_moe": LLADA2,
    "sdar_moe": SDAR_MOE,
    "sdar_moe before top-k": replace(SDAR_MOE, moe_router_pre_softmax=True),
    "sdar": SDAR,
    "megatron_dllm": OWN,
}


class Export(NamedTuple):
    """A tiny model: its sizes, its checkpoint in torch_dist, and the folder exported from that."""

    model: ModelConfig
    checkpoint: Path
    folder: Path


def _weights(model: ModelConfig) -> dict[str, Tensor]:
    """Weights large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(3)
    scales = {"norm": 0.15, "embed": 0.5, "mlp.gate.weight": 0.3, "expert_bias": 0.05}
    return {
        name: float("norm" in name)
        + torch.randn(shape, generator=generator) * next((s for part, s in scales.items() if part in name), 0.15)
        for name, shape in weight_map(model).hf_shapes.items()
    }


@pytest.fixture(scope="module", params=MODELS)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> Export:
    """Every architecture of ours in turn."""
    return make_export(MODELS[request.param], tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> Export:
    """The smallest: what generate takes is the same for all."""
    return make_export(SDAR, tmp_path_factory.mktemp("dense"))


def make_export(model: ModelConfig, folder: Path) -> Export:
    (folder / "hf").mkdir()
    save_file(_weights(model), folder / "hf" / "model.safetensors")
    config = to_hf_config(model, model.family, "float32", block_size=8)
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    hf_to_mcore.convert(folder / "hf", folder / "mcore")
    mcore_to_hf.convert(folder / "mcore", folder / "out")
    return Export(model, folder / "mcore", folder / "out")


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def prompt_of(length: int, seed: int = 11) -> list[int]:
    return torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()


PROMPT = prompt_of(13)


def expected_tokens(
    module: Any, model: ModelConfig, prompt: list[int], block_size: int = 8, **settings: Any
) -> list[int]:
    """What the decoding of this project gives, prompt included."""
    from megatron_dllm.inference.cached_forward import CachedForward

    contract = DecodingContract(block_size, model.max_position_embeddings, model.mask_token_id, (model.eos_token_id,))
    return prompt + decode(CachedForward(module), prompt, DecodingConfig(**settings), contract).generated_ids


@torch.no_grad()
def test_logits_equal_ours(export: Export) -> None:
    model, ours = load(export.folder), load_ours(export.checkpoint)
    ids = torch.randint(0, export.model.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    for blocks in ([0] * LENGTH, [i // 4 for i in range(LENGTH)]):
        block = torch.tensor(blocks)
        expected = logits_of(ours, ids, blocks)
        actual = model(ids, attention_mask=(block.unsqueeze(0) <= block.unsqueeze(1))[None, None]).logits
        assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("block_size", "settings"),
    [
        (8, {"threshold": 0.3}),
        (4, {"threshold": 0.9, "min_tokens_per_step": 3}),
        (1, {}),
        (8, {"threshold": 0.5, "temperature": 1.2, "top_p": 0.7, "top_k": 20, "seed": 8}),
    ],
)
def test_generate_gives_our_tokens(export: Export, block_size: int, settings: dict[str, Any]) -> None:
    model, ours = load(export.folder), load_ours(export.checkpoint)
    for length in (1, 8, 13):
        prompt = prompt_of(length)
        expected = expected_tokens(ours, export.model, prompt, block_size, max_new_tokens=21, **settings)
        actual = model.generate(torch.tensor([prompt]), block_size=block_size, max_new_tokens=21, **settings)
        assert actual[0].tolist() == expected


def test_the_configuration_says_what_engines_read(export: Export, tmp_path: Path) -> None:
    """SGLang reads rope_theta as an attribute and takes 10000 without; it loads the class that auto_map names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(export.folder, trust_remote_code=True)
    config.save_pretrained(tmp_path / "saved")
    for read in (config, AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)):
        assert read.rope_theta == export.model.rotary_base
        assert type(read).__module__.startswith("transformers_modules")
        assert (read.mask_token_id, read.block_length) == (export.model.mask_token_id, 8)
        assert (read.rope_scaling or {}).get("rope_type", "default") == "default"


SCALINGS = {
    "llada2_moe": RotaryScalingConfig("yarn", 4.0, 16),
    "sdar_moe": RotaryScalingConfig("yarn", 2.0, 64, beta_fast=4.0, attention_factor=1.3),
    "sdar": RotaryScalingConfig("llama3", 8.0, 16),
    "megatron_dllm": RotaryScalingConfig("yarn", 4.0, 16),
}


@pytest.mark.parametrize("family", SCALINGS)
@torch.no_grad()
def test_a_stretched_model_computes_and_decodes_as_ours(family: str, tmp_path: Path, one_rank: None) -> None:
    """And is the same model when transformers has saved it, and when we have read that."""
    export = make_export(replace(MODELS[family], rotary_scaling=SCALINGS[family]), tmp_path)
    model, ours = load(export.folder), load_ours(export.checkpoint)
    ids = torch.randint(0, export.model.vocab_size, (1, 100), generator=torch.Generator().manual_seed(5))
    block = torch.arange(100) // 4
    expected = logits_of(ours, ids, block.tolist())
    mask = (block.unsqueeze(0) <= block.unsqueeze(1))[None, None]
    actual = model(ids, attention_mask=mask).logits
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert model.generate(torch.tensor([PROMPT]), block_size=8, max_new_tokens=9)[0].tolist() == expected_tokens(
        ours, export.model, PROMPT, max_new_tokens=9
    )
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(ids, attention_mask=mask).logits, actual)
    hf_to_mcore.convert(tmp_path / "saved", tmp_path / "again")
    again, stored = (read_stored_model(folder).model for folder in (tmp_path / "again", export.checkpoint))
    assert again == stored and stored.rotary_scaling == SCALINGS[family]


def test_a_scaling_that_the_layers_lack_is_refused(dense: Export, tmp_path: Path) -> None:
    from transformers import AutoConfig

    shutil.copytree(dense.folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for scaling, message in (
        ({"rope_type": "linear", "factor": 2.0}, r"rope_scaling \(linear\) must be null, yarn or llama3"),
        ({"rope_type": "yarn", "factor": 2.0}, r"must have factor, .*correct original_max_position_embeddings"),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)


@torch.no_grad()
def test_what_transformers_saves_again_is_the_same_model(export: Export, tmp_path: Path) -> None:
    """Code included, and for us too."""
    model = load(export.folder)
    model.save_pretrained(tmp_path / "saved")
    ids = torch.tensor([PROMPT])
    assert torch.equal(load(tmp_path / "saved")(ids).logits, model(ids).logits)
    hf_to_mcore.convert(tmp_path / "saved", tmp_path / "mcore")
    assert read_stored_model(tmp_path / "mcore").model == read_stored_model(export.checkpoint).model


def test_two_rope_values_that_differ_are_refused(export: Export, tmp_path: Path) -> None:
    from transformers import AutoConfig

    shutil.copytree(export.folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"rope_theta \(.*\) contradicts rope_parameters"):
        AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)


@pytest.fixture(scope="module")
def models(dense: Export) -> tuple[Any, Any]:
    """The smallest model as transformers loads it, and ours."""
    return load(dense.folder), load_ours(dense.checkpoint)


QUIET = {"num_beams": 1, "use_cache": True, "assistant_model": None, "logits_processor": [], "eos_early_stop": False}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {}),
        ({"gen_length": 21, "block_length": 4}, {"max_new_tokens": 21, "block_size": 4}),
        ({"max_length": 34}, {"max_new_tokens": 21}),
        ({"max_length": 34, "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_length": 10**6, "max_new_tokens": None, "threshold": 0.2}, {"max_new_tokens": 499, "threshold": 0.2}),
        ({"steps": 3, "threshold": 1.0}, {"min_tokens_per_step": 3, "threshold": 1.0}),
        ({"steps": 32}, {}),
        ({"minimal_topk": 2, "threshold": 1.0}, {"min_tokens_per_step": 2, "threshold": 1.0}),
        ({"do_sample": True, "top_k": 20, "seed": 8}, {"temperature": 1.0, "top_k": 20, "seed": 8}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"mask_id": 95, "mask_token_id": 95, **QUIET}, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:temperature")
def test_generate_takes_what_people_type(
    models: tuple[Any, Any], dense: Export, arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    model, ours = models
    lengths = {} if arguments.keys() & {"max_length", "max_new_tokens", "gen_length"} else {"max_new_tokens": 21}
    tokens = model.generate(torch.tensor([PROMPT]), **lengths, **arguments)
    assert tokens[0].tolist() == expected_tokens(ours, dense.model, PROMPT, **{"max_new_tokens": 21, **expected})


def test_generate_takes_a_generation_config(models: tuple[Any, Any], dense: Export) -> None:
    from transformers import GenerationConfig

    model, ours = models
    asked = GenerationConfig(max_new_tokens=40, do_sample=True, temperature=0.7, top_k=0)
    ids = torch.tensor([PROMPT])
    expected = expected_tokens(ours, dense.model, PROMPT, max_new_tokens=40, temperature=0.7)
    assert model.generate(ids, generation_config=asked)[0].tolist() == expected
    expected = expected_tokens(ours, dense.model, PROMPT, max_new_tokens=8)
    assert model.generate(ids, asked, max_length=21, do_sample=False)[0].tolist() == expected


@pytest.mark.parametrize("name", ["eos_id", "eos_token_id"])
def test_generate_stops_at_any_of_the_eos_tokens(models: tuple[Any, Any], name: str) -> None:
    free = models[0].generate(torch.tensor([PROMPT]), max_new_tokens=21)[0].tolist()
    for eos in (free[20], [94, free[20]]):
        ended = models[0].generate(torch.tensor([PROMPT]), max_new_tokens=21, **{name: eos})[0].tolist()
        assert ended == free[: free.index(free[20], 13) + 1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {"max_length": 30}, {"temperature": 1.0}], ids=str)
def test_a_padded_batch_decodes_as_each_prompt_alone(
    models: tuple[Any, Any], dense: Export, side: str, settings: dict[str, Any]
) -> None:
    model, pad = models[0], dense.model.pad_token_id
    prompts = [prompt_of(length) for length in (5, 16, 9)]
    rows = [[pad] * (16 - len(p)) + p if side == "left" else p + [pad] * (16 - len(p)) for p in prompts]
    masks = [[int(token != pad) for token in row] for row in rows]
    limit = settings if "max_length" in settings else {"max_new_tokens": 19, **settings}
    batch = model.generate(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks), seed=5, **limit)
    assert batch[:, :16].tolist() == rows
    for index, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), seed=5 + index, **limit)[0, len(prompt) :].tolist()
        assert batch[index, 16:].tolist() == alone + [pad] * (batch.shape[1] - 16 - len(alone))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, r"num_beams \(4\) is not part of block-diffusion decoding"),
        ({"num_return_sequences": 2}, r"num_return_sequences \(2\)"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty \(1.2\)"),
        ({"streamer": object()}, "streamer"),
        ({"stopping_criteria": [len]}, "stopping_criteria"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"tempratur": 0.5}, r"tempratur \(0.5\) .* temperature"),
        ({"inputs_embeds": torch.zeros(1, 1, 1)}, "inputs_embeds"),
        ({"cfg_scale": 2.0}, "cfg_scale"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\) must be a positive integer"),
        ({"gen_length": 2.5}, r"gen_length \(2.5\)"),
        ({"gen_length": 8, "max_new_tokens": 9}, r"gen_length \(8\) and max_new_tokens \(9\) are one setting"),
        ({"max_length": 13}, r"max_length \(13\) must exceed the prompt of row 0 \(13 tokens\)"),
        ({"block_length": True}, r"block_length \(True\)"),
        ({"steps": 0}, r"steps \(0\)"),
        ({"steps": 4, "min_tokens_per_step": 1}, r"steps \(4\) and min_tokens_per_step \(1\)"),
        ({"threshold": 0.0}, r"threshold \(0.0\) must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p \(1.5\)"),
        ({"top_k": -1}, r"top_k \(-1\)"),
        ({"temperature": -1.0}, r"temperature \(-1.0\)"),
        ({"temperature": 0.0, "do_sample": True}, r"temperature \(0\) must be above 0"),
        ({"seed": -1}, r"seed \(-1\)"),
        ({"eos_id": 2.5}, r"eos_id \(2.5\) must be a token or a list of tokens"),
        ({"eos_token_id": ["x"]}, r"eos_token_id \(\['x'\]\)"),
        ({"pad_token_id": "x"}, r"pad_token_id \(x\)"),
        ({"do_sample": "yes"}, r"do_sample \(yes\) must be True or False"),
        ({"generation_config": {"top_k": 5}}, r"generation_config \(dict\) must be a GenerationConfig"),
        ({"attention_mask": [[1] * 13]}, r"attention_mask \(list\)"),
        ({"mask_id": 7}, r"mask_token_id \(7\) must be the mask token of the model \(95\)"),
        ({"input_ids": torch.ones(1, 3).long()}, "inputs and input_ids"),
        ({"token_type_ids": torch.ones(1, 13)}, "token_type_ids"),
        ({"attention_mask": torch.ones(1, 12)}, r"attention_mask \(\[1, 12\]\)"),
        ({"attention_mask": torch.zeros(1, 13)}, "attention_mask of row 0 .* 0 ones"),
        (
            {"attention_mask": torch.tensor([[1] * 6 + [0] + [1] * 6])},
            "attention_mask of row 0 must be ones in one piece",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_generate_refuses_by_name(models: tuple[Any, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models[0].generate(torch.tensor([PROMPT]), **arguments)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([[1, 2]], r"inputs \(list\) must be prompts .* generate\(\*\*tokenizer"),
        (torch.tensor([1, 2]), r"inputs \(\[2\]\)"),
        (torch.zeros(1, 0).long(), r"inputs \(\[1, 0\]\)"),
        (torch.ones(1, 3), "of token ids"),
        (torch.tensor([[1, 2], [93, 2]]), r"attention_mask \(None\) must mark the padding"),
        (torch.tensor([[1, 96]]), "hold token 96, the vocabulary ends at 95"),
        (torch.tensor([[1, 95]]), r"mask token \(95\)"),
        (torch.ones(1, 512).long(), r"512 tokens\) must be shorter than max_position_embeddings"),
    ],
    ids=["list", "flat", "empty", "floats", "unmarked padding", "vocabulary", "mask token", "too long"],
)
def test_generate_refuses_impossible_prompts(models: tuple[Any, Any], inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models[0].generate(inputs)


@pytest.fixture(scope="module")
def with_tokenizer(dense: Export) -> Path:
    """The export with a tokenizer of letters, whose class is not named."""
    write_tokenizer(dense.folder.parent / "tokenizer")
    mcore_to_hf.convert(dense.checkpoint, dense.folder.parent / "with", tokenizer=dense.folder.parent / "tokenizer")
    return dense.folder.parent / "with"


def test_generate_takes_what_a_tokenizer_returns(models: tuple[Any, Any], dense: Export, with_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer, trust_remote_code=True)
    encoded = tokenizer(["the cat", "once upon"], return_tensors="pt", padding=True, return_token_type_ids=True)
    assert "token_type_ids" in encoded
    tokens = models[0].generate(**encoded, max_new_tokens=8)
    ids = tokenizer("the cat", add_special_tokens=False).input_ids
    expected = expected_tokens(models[1], dense.model, ids, max_new_tokens=8)[len(ids) :]
    assert tokens[0, encoded.input_ids.shape[1] :].tolist() == expected


def test_a_pipeline_decodes(models: tuple[Any, Any], dense: Export, with_tokenizer: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer, trust_remote_code=True)
    pipe = pipeline("text-generation", model=models[0], tokenizer=tokenizer)
    ids = tokenizer("the cat", add_special_tokens=False).input_ids
    for settings, ours in (({"do_sample": False}, {}), ({}, {"temperature": 0.7})):
        text = pipe("the cat", max_new_tokens=8, return_full_text=False, **settings)[0]["generated_text"]
        expected = expected_tokens(models[1], dense.model, ids, max_new_tokens=8, **ours)[len(ids) :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_card_can_be_followed_as_it_stands(
    with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its Python block runs, and its YAML block is the file that lies beside it."""
    card = (with_tokenizer / "README.md").read_text()
    assert str(with_tokenizer.parent) not in card
    monkeypatch.chdir(with_tokenizer)
    code = card.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 1
    assert card.split("```yaml\n")[1].split("```")[0] == (with_tokenizer / "dllm_algorithm.yaml").read_text()
