"""Texts that lm-evaluation-harness asks for, by the program's own decoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from megatron.core.utils import unwrap_model

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.decode import DecodingContract, requests_of
from megatron_dllm.diffusion.generation import Generation, Request
from megatron_dllm.evaluation.continuations import Continuation
from megatron_dllm.evaluation.harness.requests import Encoder
from megatron_dllm.evaluation.local_model import LocalModel
from megatron_dllm.inference.decoder import Decoder
from megatron_dllm.inference.prompts import chat_contract
from megatron_dllm.inference.stopping import StopStrings

# What a task may say of its texts. Of `num_beams` there is one.
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams")


class _Sampling(NamedTuple):
    """Values of `DecodingConfig` that a task may set."""

    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True)
class Written:
    """A text without what ended it, and how it was decoded."""

    text: str
    generation: Generation


@dataclass(frozen=True)
class Writer:
    """Writes what tasks ask for.

    Attributes:
        decoder: of the model.
        config: rule and threshold; what a task says of sampling and length goes before.
        encoder: of the checkpoint's tokenizer.
        may_cut: whether the beginning of a prompt may be left out that does not fit.
    """

    decoder: Decoder
    config: DecodingConfig
    encoder: Encoder
    may_cut: bool

    @classmethod
    def of(
        cls,
        model: LocalModel,
        encoder: Encoder,
        config: DecodingConfig,
        contract: DecodingContract,
        batch_size: int,
        may_cut: bool = False,
    ) -> Writer:
        """A writer of a loaded model.

        Args:
            model: this rank's part, in one piece.
            encoder: of its tokenizer.
            config: of decoding.
            contract: block grid and special tokens.
            batch_size: most texts at a time, on each replica.
            may_cut: whether the beginning of a prompt may be left out that does not fit.
        """
        (chunk,) = model.chunks
        return cls(Decoder(unwrap_model(chunk), model.groups, contract, batch_size), config, encoder, may_cut)

    def write(self, asked: Sequence[Instance]) -> list[Written]:
        """A text for each prompt (a collective).

        Raises:
            ValueError: a prompt that does not fit the window, or a setting of a task that has no meaning here.
        """
        groups: dict[_Sampling, list[int]] = defaultdict(list)
        for place, instance in enumerate(asked):
            groups[self._sampling(instance)].append(place)
        texts: dict[int, Written] = {}
        for sampling, places in groups.items():
            stops = [self._stops(asked[place]) for place in places]
            requests = [self._request(asked[place], place, stop) for place, stop in zip(places, stops, strict=True)]
            found = self.decoder.decode(requests, replace(self.config, **sampling._asdict()))
            for place, stop, generation in zip(places, stops, found, strict=True):
                texts[place] = Written(stop.text_of(generation), generation)
        return [texts[place] for place in range(len(asked))]

    def would_write(self, asked: Sequence[Continuation]) -> list[bool]:
        """Whether each continuation is what the model writes token by token, the likeliest one each time."""
        config = replace(self.config, rule="threshold", threshold=1.0, min_tokens_per_step=1, temperature=0.0)
        requests = requests_of([item.context for item in asked], config)
        requests = [
            replace(request, max_new_tokens=len(item.tokens)) for request, item in zip(requests, asked, strict=True)
        ]
        found = self.decoder.decode(requests, config)
        return [tuple(text.generated_ids) == item.tokens for text, item in zip(found, asked, strict=True)]

    def _request(self, instance: Instance, place: int, stop: StopStrings) -> Request:
        context = instance.args[0]
        ids = self.encoder.encode(context) or [self.encoder.eot_token_id]
        # At least one token is written.
        fitted = Continuation(tuple(ids), (0,), name=_name(instance)).fitted(
            self.decoder.contract.context_length, self.may_cut
        )
        return Request(fitted.context, self._length(instance), self.config.seed + place, stop.find)

    def _stops(self, instance: Instance) -> StopStrings:
        until = _settings(instance).get("until", [])
        return StopStrings(self.encoder.tokenizer, (until,) if isinstance(until, str) else tuple(until))

    def _length(self, instance: Instance) -> int:
        return int(_settings(instance).get("max_gen_toks", self.config.max_new_tokens))

    def _sampling(self, instance: Instance) -> _Sampling:
        """What a task asks for; where it says nothing of it, what the user does."""
        settings = _settings(instance)
        unknown = [name for name in settings if name not in _KNOWN]
        if unknown or settings.get("num_beams", 1) != 1:
            name = unknown[0] if unknown else "num_beams"
            raise ValueError(
                f"{_name(instance)}: generation_kwargs {name} ({settings[name]}) has no meaning in block decoding; "
                f"take it out of the task. Known are {', '.join(_KNOWN[:-1])}."
            )
        sampling = self._sampling_of(settings)
        try:
            replace(self.config, max_new_tokens=self._length(instance), **sampling._asdict()).validate()
        except ValueError as error:
            raise ValueError(f"{_name(instance)}: generation_kwargs {error} Correct the task.") from None
        return sampling

    def _sampling_of(self, settings: dict[str, Any]) -> _Sampling:
        """As the harness has it, a temperature means sampling unless do_sample says otherwise."""
        config = self.config
        if not settings.get("do_sample", float(settings.get("temperature", config.temperature)) > 0.0):
            return _Sampling(0.0, 1.0, 0)
        return _Sampling(
            float(settings.get("temperature", config.temperature or 1.0)),
            float(settings.get("top_p", config.top_p)),
            int(settings.get("top_k", config.top_k)),
        )


def _settings(instance: Instance) -> dict[str, Any]:
    """What the task says of its texts; null says nothing."""
    return {name: value for name, value in instance.args[1].items() if value is not None}


def _name(instance: Instance) -> str:
    return f"task {instance.task_name}, question {instance.doc_id}"


def contract_of(
    block_size: int,
    context_length: int,
    encoder: Encoder,
    is_chat: bool,
    shift: bool = False,
    clean_block_size: int | None = None,
) -> DecodingContract:
    """How a checkpoint is decoded: in chats the end of a turn ends a text, too."""
    ends = (encoder.eot_token_id,)
    contract = DecodingContract(block_size, context_length, encoder.mask_token_id, ends, shift, clean_block_size)
    if not is_chat:
        return contract
    assert encoder.template is not None, "a run that asks for chats has a template"
    return chat_contract(contract, encoder.template)
