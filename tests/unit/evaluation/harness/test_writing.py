"""What tasks say of their texts becomes settings of the decoder; what has no meaning here is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.decode import DecodingContract
from megatron_dllm.diffusion.generation import Generation, Request
from tests.conftest import NOT_RUN

pytest.importorskip("lm_eval", reason=f"{NOT_RUN}no lm-evaluation-harness here; pip install -e '.[eval]'")

from lm_eval.api.instance import Instance

from megatron_dllm.evaluation.continuations import Continuation
from megatron_dllm.evaluation.harness.writing import Writer, contract_of


@dataclass
class Letters:
    """A tokenizer of one token a letter, and what else an encoder has."""

    eot_token_id: int = 0

    @property
    def tokenizer(self) -> Letters:
        return self

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


@dataclass
class Parrot:
    """A decoder that says the prompt again, up to a stop or the length, and remembers what it was asked."""

    context_length: int = 16
    asked: list[tuple[DecodingConfig, list[Request]]] = field(default_factory=list)

    @property
    def contract(self) -> Parrot:
        return self

    def decode(self, requests: list[Request], config: DecodingConfig) -> list[Generation]:
        self.asked.append((config, requests))
        return [self._text(request) for request in requests]

    def _text(self, request: Request) -> Generation:
        ids = list(request.ids)[: request.max_new_tokens]
        length = request.stop(ids)
        return Generation(ids[:length], "max_new_tokens" if length is None else "stop", [1], 0, [1] * len(ids))


def instance(text: str, **settings: Any) -> Instance:
    return Instance("generate_until", {}, (text, settings), 0, ("task", 3, 1))


def writer(config: DecodingConfig | None = None, may_cut: bool = False) -> tuple[Writer, Parrot]:
    parrot = Parrot()
    return Writer(parrot, config or DecodingConfig(seed=7), Letters(), may_cut), parrot  # type: ignore[arg-type]


def texts(made: Writer, asked: list[Instance]) -> list[str]:
    return [one.text for one in made.write(asked)]


def test_the_contract_of_a_decoder_is_what_the_model_was_trained_with() -> None:
    encoder = SimpleNamespace(mask_token_id=7, eot_token_id=0, template=None)
    expected = DecodingContract(32, 64, 7, (0,), shift=True, clean_block_size=1)
    assert contract_of(32, 64, encoder, False, True, 1) == expected  # type: ignore[arg-type]
    assert contract_of(32, 64, encoder, False) == DecodingContract(32, 64, 7, (0,))  # type: ignore[arg-type]


def test_texts_end_where_tasks_say() -> None:
    made, parrot = writer()
    asked = [instance("abcdef", until=["d", "e"]), instance("abcdef", until="b"), instance("abcdef", max_gen_toks=2)]
    assert texts(made, asked) == ["abc", "a", "ab"]
    ((config, requests),) = parrot.asked
    assert (config.temperature, [request.seed for request in requests]) == (0.0, [7, 8, 9])
    assert [request.max_new_tokens for request in requests] == [256, 256, 2]


def test_sampling_is_the_task_s_or_else_the_user_s() -> None:
    made, parrot = writer(DecodingConfig(temperature=0.5, top_p=0.9))
    asked = [instance("a", do_sample=True, temperature=0.7), instance("b", do_sample=False), instance("c", top_k=3)]
    assert texts(made, asked) == ["a", "b", "c"]
    found = [(config.temperature, config.top_p, config.top_k) for config, _ in parrot.asked]
    assert found == [(0.7, 0.9, 0), (0.0, 1.0, 0), (0.5, 0.9, 3)]


def test_long_prompts_are_cut_only_if_that_is_allowed() -> None:
    long = "abcdefghijklmnopqrstuvw"
    with pytest.raises(ValueError, match=r"question 3: context and continuation \(23 \+ 1 tokens\) must fit"):
        writer()[0].write([instance(long)])
    made, parrot = writer(may_cut=True)
    assert texts(made, [instance(long)]) == [long[-15:]] and len(parrot.asked[0][1][0].ids) == 15
    assert texts(writer()[0], [instance("", max_gen_toks=1)]) == ["\0"]


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.2}, {"num_beams": 3}])
def test_settings_without_meaning_are_refused(settings: dict[str, float]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"task, question 3: generation_kwargs {name} \({value}\) has no meaning"):
        writer()[0].write([instance("a", **settings)])
    assert texts(writer()[0], [instance("a", num_beams=1, max_gen_toks=None, until=None)]) == ["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 0}, r"max_new_tokens \(0\) must be positive"),
        ({"temperature": 0.5, "top_p": 1.5}, r"top_p \(1\.5\) must lie in"),
        ({"temperature": -0.5, "do_sample": True}, r"temperature \(-0\.5\) must be finite and not negative"),
    ],
)
def test_impossible_settings_are_refused_with_the_task_s_name(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"task, question 3: generation_kwargs {message}.* Correct the task"):
        writer()[0].write([instance("a", **settings)])


def test_a_temperature_means_sampling() -> None:
    made, parrot = writer()
    made.write([instance("a", temperature=0.7), instance("b", temperature=0.7, do_sample=False), instance("c")])
    assert [config.temperature for config, _ in parrot.asked] == [0.7, 0.0]


def test_a_greedy_continuation_is_what_the_decoder_writes() -> None:
    made, parrot = writer(DecodingConfig(threshold=0.5, temperature=1.0))
    asked = [Continuation((1, 2, 3), (1, 2)), Continuation((1, 2, 3), (1, 3))]
    assert made.would_write(asked) == [True, False]
    config, requests = parrot.asked[0]
    assert (config.threshold, config.temperature, [request.max_new_tokens for request in requests]) == (
        1.0,
        0.0,
        [2, 2],
    )
