"""From a checkpoint on disk to text: cached against uncached passes, torch_dist against HF, the command line."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ranks import run_ranks
from megatron_dllm.checkpoint.meta import CheckpointMeta, Position, Provenance, Semantics
from megatron_dllm.config import DecodingConfig, GenerateConfig, ModelConfig, ParallelConfig, RotaryScalingConfig
from megatron_dllm.diffusion.decode import DecodingContract, decode, requests_of
from megatron_dllm.diffusion.decoding_pass import DecodingPass
from megatron_dllm.diffusion.roles import CLEAN_VIEW, VIEW
from megatron_dllm.generate import PromptResult, generate, parse_arguments
from tests.integration.tiny_chain import run_module
from tests.tiny_models import as_qwen3

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
EOS, PAD, MASK = "<|eos|>", "<|pad|>", "<|mask|>"
VOCAB = [EOS, PAD, MASK, *LETTERS]
MODEL = ModelConfig(
    family="llada2_moe",
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=32,
    max_position_embeddings=128,
    rotary_base=10000.0,
    rotary_percent=0.5,
    num_dense_layers=1,
    num_moe_experts=8,
    moe_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=16,
    moe_router_topk=4,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_topk_scaling_factor=2.5,
    eos_token_id=0,
    pad_token_id=1,
    mask_token_id=2,
)
QWEN = as_qwen3(MODEL, "sdar_moe")
PROMPTS = ["the cat", "a", "once upon a time there was."]
SETTINGS = GenerateConfig(threshold=0.5, max_new_tokens=24, block_size=8)


def write_tokenizer(folder: Path) -> None:
    """One token a letter."""
    folder.mkdir(parents=True)
    special = [
        {
            "id": i,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, text in enumerate(VOCAB[:3])
    ]
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": special,
                "normalizer": None,
                "post_processor": None,
                "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
                "decoder": {"type": "Fuse"},
                "model": {"type": "WordLevel", "vocab": {text: i for i, text in enumerate(VOCAB)}, "unk_token": PAD},
            }
        )
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": MASK, "eos_token": EOS, "pad_token": PAD}))


def save_run(run: Path, model: ModelConfig, shift: bool = False, seed: int = 3) -> Path:
    """A run folder with one checkpoint of a random model whose predictions are sharp and depend on the context."""
    from megatron_dllm.checkpoint.saving import CheckpointWriter
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    module = build_model(model, ParallelConfig(), Groups.current())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                gain = 4.0 if name.startswith("output_layer") else 1.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / parameter.shape[-1] ** 0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    meta = CheckpointMeta(
        asdict(model),
        Semantics(
            shift=shift, block_origin="document", mask_token_id=2, block_size=1 if shift else 8, context_length=64
        ),
        Position(step=5, stage="decay", is_stage_end=True),
        Provenance(tokenizer="../../tokenizer"),
    )
    CheckpointWriter(run / "checkpoints", Groups.current().data_context).save(5, [module], None, meta, {})
    write_tokenizer(run / "tokenizer")
    return run


@pytest.fixture(scope="module")
def run(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "bailing", MODEL)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def without_time(results: list[PromptResult]) -> list[PromptResult]:
    return [replace(result, seconds=0.0) for result in results]


class UncachedForward:
    """Runs everything committed so far again in every pass, in one dense forward of the whole model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.committed: list[DecodingPass] = []

    @torch.no_grad()
    def run(self, step: DecodingPass) -> Iterator[tuple[range, Tensor]]:
        before = tuple(self.committed)
        if bool((step.roles[..., VIEW] == CLEAN_VIEW).all()):
            self.committed.append(step)
            if not len(step.wanted):
                return
        ids, positions, roles = (
            torch.cat([getattr(part, name) for part in (*before, step)], 1)
            for name in ("input_ids", "position_ids", "roles")
        )
        states = self.model.states(ids, positions, roles, step.wanted + ids.shape[1] - step.shape[1])
        yield range(1), self.model.head_logits(states)

    def copy(self, source: int, target: int, length: int) -> None:
        raise AssertionError("there is one text")


@pytest.mark.parametrize(
    ("block_size", "threshold", "shift"),
    [(1, 0.5, False), (4, 0.5, False), (8, 0.5, False), (64, 1.0, False), (1, 0.5, True), (4, 0.5, True)],
)
def test_cached_decoding_equals_uncached(
    one_rank: Any, run: Path, block_size: int, threshold: float, shift: bool
) -> None:
    from megatron_dllm.inference.cached_forward import CachedForward
    from megatron_dllm.inference.load import load_model
    from megatron_dllm.inference.source import read_source

    source = read_source(replace(SETTINGS, checkpoint=str(run), prompt="x"))
    cached, dense = (load_model(source, one_rank, "fp32", backend) for backend in ("auto", "dense"))
    contract = DecodingContract(block_size, 64, MODEL.mask_token_id, (-1,), shift=shift)
    config = DecodingConfig(threshold=threshold, max_new_tokens=24)
    texts = set()
    for prompt in ([5, 6, 7], [9] * 8, list(range(3, 26))):
        result = decode(CachedForward(cached), prompt, config, contract)
        assert result == decode(UncachedForward(dense), prompt, config, contract)
        texts.add(tuple(result.generated_ids))
        # Random weights, yet no constant text: the comparison says something.
        assert len(set(result.generated_ids)) > 1
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("model", "precision"),
    [(MODEL, "fp32"), (MODEL, "bf16"), (QWEN, "fp32")],
    ids=["llada2_moe", "llada2_moe_bf16", "sdar_moe"],
)
def test_hf_folder_gives_the_text_of_the_torch_dist_checkpoint(
    one_rank: None, model: ModelConfig, precision: str, prompts_file: Path, tmp_path: Path
) -> None:
    from checkpoints_tools.mcore_to_hf import convert

    run = save_run(tmp_path / "run", model)
    convert(run, tmp_path / "hf")
    config = replace(SETTINGS, prompts_file=str(prompts_file), precision=precision)
    expected = generate(replace(config, checkpoint=str(run)))
    results = generate(replace(config, checkpoint=str(tmp_path / "hf")))
    assert without_time(results) == without_time(expected)
    assert [result.prompt for result in results] == PROMPTS
    assert len({result.text for result in results}) == 3


def test_hf_folder_with_fused_experts_gives_the_same_text_and_one_with_nan_none(
    one_rank: None, run: Path, prompts_file: Path, tmp_path: Path
) -> None:
    from checkpoints_tools.mcore_to_hf import convert

    convert(run, tmp_path / "hf")
    config = replace(SETTINGS, prompts_file=str(prompts_file), checkpoint=str(tmp_path / "hf"))
    expected = generate(config)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for prefix in {name.split(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}:
        gate, up, down = (
            [tensors.pop(name) for name in (f"{prefix}.{e}.{part}_proj.weight" for e in range(999)) if name in tensors]
            for part in ("gate", "up", "down")
        )
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], dim=1)
        tensors[f"{prefix}.down_proj"] = torch.stack(down)
    assert any(name.endswith("gate_up_proj") for name in tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert without_time(generate(config)) == without_time(expected)
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight holds 1 NaN"):
        generate(config)


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a {% endif %}{{ m.content }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def test_chats_are_answered_up_to_the_end_of_the_turn(one_rank: None, tmp_path: Path) -> None:
    from checkpoints_tools.mcore_to_hf import convert

    run = save_run(tmp_path / "run", MODEL)
    (run / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    convert(run, tmp_path / "hf")
    stops = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [1, MODEL.eos_token_id], "an engine stops at the end of a turn too"
    chats = [[{"role": "user", "content": text}] for text in ("the cat", "who", "once upon", "there was a dog")]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    config = replace(SETTINGS, chats_file=str(tmp_path / "chats.jsonl"), max_new_tokens=60)
    results = generate(replace(config, checkpoint=str(run)))
    assert [result.prompt for result in results] == [f"{chat[0]['content']}{PAD}a " for chat in chats]
    assert without_time(generate(replace(config, checkpoint=str(tmp_path / "hf")))) == without_time(results)
    ends = [result.generation.generated_ids[-1] for result in results if result.generation.stop_reason == "eos"]
    assert 1 in ends, "no answer ends with the token that ends a turn"
    for result in results:
        assert not {0, 1} & set(result.generation.generated_ids[:-1])
        assert [VOCAB[token] for token in result.generation.generated_ids] == result.token_texts
        assert len(result.to_dict()["accepted_in_pass"]) == len(result.token_texts)
    alone = generate(replace(SETTINGS, checkpoint=str(run), messages=json.dumps(chats[0]), max_new_tokens=60))
    assert without_time(alone) == without_time(results[:1])


def test_a_hundred_prompts_decoded_together_give_the_texts_of_each_alone(one_rank: Any, run: Path) -> None:
    from megatron_dllm.inference.cached_forward import CachedForward
    from megatron_dllm.inference.decoder import Decoder
    from megatron_dllm.inference.load import load_model
    from megatron_dllm.inference.source import read_source

    model = load_model(read_source(replace(SETTINGS, checkpoint=str(run), prompt="x")), one_rank, "fp32", "auto")
    contract = DecodingContract(8, 64, MODEL.mask_token_id, (0, 1, 17))
    config = DecodingConfig(threshold=0.5, max_new_tokens=30)
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(3, 30, (int(torch.randint(1, 60, (), generator=generator)),), generator=generator).tolist()
        for _ in range(100)
    ]
    expected = [decode(CachedForward(model), prompt, config, contract) for prompt in prompts]
    assert Decoder(model, one_rank, contract, 16).decode(requests_of(prompts, config), config) == expected
    assert len({len(generation.steps_per_block) for generation in expected}) > 2, "all texts end at once"
    assert len({tuple(generation.generated_ids) for generation in expected}) > 50


def test_step_folder_and_run_folder_are_the_same_checkpoint(run: Path) -> None:
    config = replace(SETTINGS, prompt="the cat")
    expected = generate(replace(config, checkpoint=str(run)))
    for folder in (run / "checkpoints", run / "checkpoints" / "step_0000005"):
        assert without_time(generate(replace(config, checkpoint=str(folder)))) == without_time(expected)


def test_block_size_of_the_checkpoint_is_the_default(run: Path) -> None:
    config = replace(SETTINGS, checkpoint=str(run), prompt="the cat")
    assert without_time(generate(replace(config, block_size=None))) == without_time(generate(config))
    assert without_time(generate(replace(config, block_size=1))) != without_time(generate(config))


def test_sampled_text_depends_on_the_seed_and_the_place_of_the_prompt(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "the cat"}\n\n{"prompt": "the cat", "id": 3}\n')
    config = replace(SETTINGS, checkpoint=str(run), prompts_file=str(tmp_path / "p.jsonl"), temperature=2.0)
    first, second = generate(config)
    assert first.text != second.text
    later, _ = generate(replace(config, seed=config.seed + 1))
    assert later.text == second.text


def test_stop_strings_cut_the_text_and_end_it(run: Path, prompts_file: Path) -> None:
    config = replace(SETTINGS, checkpoint=str(run), prompts_file=str(prompts_file))
    free = generate(config)
    longest = max((result.text for result in free), key=len)
    letter = longest[len(longest) // 2]
    for before, stopped in zip(free, generate(replace(config, stop=[letter, "\n\n"])), strict=True):
        assert stopped.text == before.text.partition(letter)[0]
        assert (stopped.generation.stop_reason == "stop") == (letter in before.text)
        assert len(stopped.generation.steps_per_block) <= len(before.generation.steps_per_block)


def test_output_is_written_once(run: Path, prompts_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "texts.jsonl"
    config = replace(SETTINGS, checkpoint=str(run), prompts_file=str(prompts_file), output=str(output))
    results = generate(config)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [result.to_dict() for result in results]
    for line in lines:
        assert line["tokens_per_forward"] == len(line["generated_ids"]) / sum(line["steps_per_block"])
    with pytest.raises(ValueError, match=r"output \(.*\) exists"):
        generate(config)


def test_an_interrupted_start_is_resumed(run: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.txt", tmp_path / "texts.jsonl"
    prompts.write_text("\n".join(["the cat", "a", "who", "once upon"]))
    config = replace(SETTINGS, checkpoint=str(run), prompts_file=str(prompts), temperature=1.0, batch_size=1)
    expected = [replace(result, seconds=0.0) for result in generate(config)]

    def interrupt(result: PromptResult) -> None:
        if result.prompt == "a":
            raise KeyboardInterrupt

    config = replace(config, output=str(output), resume=True)
    with pytest.raises(KeyboardInterrupt):
        generate(config, interrupt)
    assert without_time(generate(config)) == expected[2:]
    lines = [json.loads(line) | {"seconds": 0.0} for line in output.read_text().splitlines()]
    assert lines == [result.to_dict() for result in expected]
    partial = tmp_path / "texts.jsonl.partial"
    for found, message in (("who", r"partial:2 is not of prompt 2"), ("{", r"partial:2 \(\{\) is no JSON")):
        output.unlink(missing_ok=True)
        line = found if found == "{" else json.dumps({"prompt": found})
        partial.write_text(json.dumps({"prompt": "the cat"}) + "\n" + line + "\n")
        with pytest.raises(ValueError, match=message):
            generate(config)
    with pytest.raises(ValueError, match=r"resume \(true\) .* output is not given"):
        generate(replace(config, output=None))


def test_a_scaling_while_decoding_reaches_further_and_a_factor_of_1_changes_nothing(
    one_rank: None, run: Path, tmp_path: Path
) -> None:
    from checkpoints_tools.mcore_to_hf import convert

    convert(run, tmp_path / "hf")
    short, long = (replace(SETTINGS, checkpoint=str(run), prompt="the cat " * times) for times in (2, 20))
    (plain,) = generate(short)
    (same,) = generate(replace(short, rotary_scaling=RotaryScalingConfig("yarn", 1.0, 64)))
    (other,) = generate(replace(short, rotary_scaling=RotaryScalingConfig("yarn", 4.0, 8)))
    assert same.text == plain.text != other.text
    with pytest.raises(ValueError, match=r"prompt \(160 tokens\) must be shorter than context_length \(128\)"):
        generate(long)
    scaling = RotaryScalingConfig("yarn", 2.0, 128)
    texts = [
        generate(replace(long, checkpoint=str(folder), rotary_scaling=scaling)) for folder in (run, tmp_path / "hf")
    ]
    assert without_time(texts[0]) == without_time(texts[1])
    assert len(texts[0][0].generation.generated_ids) > 0


def test_an_autoregressive_checkpoint_is_decoded_from_left_to_right(one_rank: Any, tmp_path: Path) -> None:
    from megatron_dllm.data.tokenizer import load_tokenizer
    from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
    from megatron_dllm.inference.load import load_model
    from megatron_dllm.inference.source import read_source

    run = save_run(tmp_path / "ar", replace(MODEL, family="bailing_moe"), shift=True)
    config = replace(SETTINGS, checkpoint=str(run), prompt="the cat", block_size=None, max_new_tokens=12)
    source = read_source(config)
    model = load_model(source, one_rank, "fp32", "dense")
    text = load_tokenizer(TokenizerFiles(source.tokenizer)).encode("the cat", add_special_tokens=False).ids
    first = len(text)
    while len(text) < first + 12 and MODEL.eos_token_id not in text[first:]:
        places = torch.arange(len(text))
        roles = torch.stack([places * 0, places, places * 0], dim=-1).int()[None]
        with torch.no_grad():
            states = model.states(torch.tensor([text]), places[None], roles, torch.tensor([len(text) - 1]))
            logits = model.head_logits(states)[0]
        logits[MODEL.mask_token_id] = float("-inf")
        text.append(int(logits.argmax()))
    (result,) = generate(config)
    assert result.generation.generated_ids == text[first:]
    assert result.generation.tokens_per_forward == 1.0


def test_autoregressive_checkpoint_is_refused(one_rank: None, tmp_path: Path) -> None:
    run = save_run(tmp_path / "ar", replace(MODEL, family="bailing_moe"), shift=True)
    with pytest.raises(ValueError, match=r"contract\.shift \(true\) .* block_size \(8\) asks for more"):
        generate(replace(SETTINGS, checkpoint=str(run), prompt="a"))
    from checkpoints_tools.mcore_to_hf import convert

    convert(run, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"model_type \(bailing_moe\) predicts the next token"):
        generate(replace(SETTINGS, checkpoint=str(tmp_path / "hf"), prompt="a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": f"a{MASK}b"}, r"prompt 1 of 1 .* holds the mask token \(2\) at position 1"),
        ({"prompt": "a" * 128}, r"prompt \(128 tokens\) must be shorter than context_length \(128\)"),
        ({"prompt": "abc", "context_length": 3}, r"must be shorter than context_length \(3\)"),
        ({"prompt": "a", "context_length": 129}, r"context_length \(129\) must not exceed .* rotary_scaling"),
        ({"prompt": "a", "rotary_scaling": RotaryScalingConfig("linear", 2.0, 64)}, r"rotary_scaling.kind \(linear\)"),
        ({"prompt": "a", "tokenizer": "/nope"}, r"tokenizer \(/nope\) has no tokenizer\.json"),
        ({"prompt": "a", "checkpoint": "/nope"}, r"checkpoint \(/nope\) is not a folder"),
        ({"prompts_file": "/nope"}, r"prompts_file \(/nope\) is not a file"),
        ({"prompt": "a", "prompts_file": "/nope"}, r"\(prompt, prompts_file\): give exactly one of the four"),
        ({}, r"\(none is given\): give exactly one of the four"),
        ({"prompt": "a", "block_size": 0}, r"block_size \(0\) must be positive"),
        ({"prompt": "a", "attention_backend": "magic"}, r"attention_backend \(magic\) is not known"),
        ({"prompt": "a", "precision": "fp8"}, r"precision \(fp8\) is not known"),
        ({"prompt": "a", "rule": "best"}, r"rule \(best\) is not known; use one of threshold, factor"),
        ({"prompt": "a", "batch_size": 0}, r"batch_size \(0\) must be positive"),
        ({"prompt": "a", "stop": ["b", ""]}, r"stop \(\['b', ''\]\) must not hold an empty string"),
        ({"prompt": "a", "tensor_model_parallel_size": 2}, r"^tensor x pipeline x context \(2 x 1 x 1 = 2\)"),
    ],
)
def test_what_a_user_gets_wrong_is_a_value_error(run: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(replace(GenerateConfig(checkpoint=str(run)), **options))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2 \(\{\) is no JSON"),
        ('"a"', r":2 .* must be an object"),
        ('{"prompt": ""}', r":2 .* non-empty"),
        ('{"text": "a"}', r":2 .* must be an object"),
    ],
)
def test_bad_line_of_prompts_is_named(run: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        generate(replace(SETTINGS, checkpoint=str(run), prompts_file=str(tmp_path / "p.jsonl")))


def test_damaged_tokenizer_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer \(.*\) has a tokenizer\.json that cannot be read"):
        generate(replace(SETTINGS, checkpoint=str(run), prompt="a", tokenizer=str(tmp_path)))


def test_hf_folder_with_a_missing_tensor_is_refused(run: Path, tmp_path: Path) -> None:
    from checkpoints_tools.mcore_to_hf import convert

    convert(run, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"tensor model\.layers\.3\..* are missing"):
        generate(replace(SETTINGS, checkpoint=str(tmp_path / "hf"), prompt="a"))


def test_arguments_take_texts_as_typed() -> None:
    config = parse_arguments(["checkpoint=/a,b=[c]", "prompt=Hello, ${x} [1]={2}=", "threshold=0.9", "top_k=3"])
    assert config == GenerateConfig(checkpoint="/a,b=[c]", prompt="Hello, ${x} [1]={2}=", threshold=0.9, top_k=3)
    with pytest.raises(ValueError, match="thresold is not a key of the configuration; did you mean threshold"):
        parse_arguments(["checkpoint=a", "prompt=b", "thresold=1"])
    with pytest.raises(ValueError, match=r"prompt \(b\) is given twice"):
        parse_arguments(["checkpoint=a", "prompt=a", "prompt=b"])
    with pytest.raises(ValueError, match="max_new_tokens"):
        parse_arguments(["checkpoint=a", "prompt=a", "max_new_tokens=many"])


def _command(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `python -m megatron_dllm.generate`."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = run_module(["-m", "megatron_dllm.generate", *words])
    return code, output.getvalue(), errors.getvalue()


def test_command_line(run: Path) -> None:
    words = ["prompt=the cat", "threshold=0.5", "max_new_tokens=24"]
    code, output, errors = run_ranks(_command, 1, *words, f"checkpoint={run}")[0]
    assert code == 0, errors
    (expected,) = generate(replace(SETTINGS, checkpoint=str(run), prompt="the cat"))
    assert output == f"the cat{expected.text}\n"
    assert f"= {expected.generation.tokens_per_forward:.2f}" in errors
    code, _, errors = run_ranks(_command, 1, *words, "checkpoint=/nope")[0]
    assert code == 2 and "checkpoint (/nope) is not a folder" in errors
    assert "Traceback" not in errors
