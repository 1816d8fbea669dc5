"""Decoding on a layout: what a rank holds, how many texts fit, and how long a pass takes.

Each text has the keys and values of its tokens in every layer. A pass computes one block of every text, each a step
nearer to its end, or takes in prompts. Nothing is kept for a backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.config.plan import TextsConfig
from megatron_dllm.diffusion.decoding_room import LOGITS_ELEMENTS, room_for
from megatron_dllm.diffusion.prefill import MAX_TOKENS
from megatron_dllm.planning.forward import ForwardTime, forward_bytes, forward_time, number_width
from megatron_dllm.planning.layers import Tokens
from megatron_dllm.planning.layout_plan import Setting
from megatron_dllm.planning.parameters import PipelineRank, pipeline_ranks, rank_weights
from megatron_dllm.planning.parts import Parts

# Bytes of a logit while a token is chosen: in fp32, and its exponential; one in bf16 stands beside them.
_LOGIT_BYTES = 8
# Role of a token that is kept: three int32.
_ROLE_BYTES = 12
# More texts than this are not tried.
_MOST_TEXTS = 4096


@dataclass(frozen=True)
class DecodingMemory(Parts):
    """Bytes of one rank at the moment at which it holds the most, when the texts are as long as they get.

    Attributes:
        weights: in the precision of decoding.
        cache: keys and values of all texts; in a pass that makes them longer with a copy of a layer's.
        activations: of a layer; 0 where the logits are the moment.
        logits: that exist at a time, on the last pipeline rank, where they are the moment; else 0.
        reserve: what the device and its libraries take.
    """

    weights: int
    cache: int
    activations: int
    logits: int
    reserve: int


@dataclass(frozen=True)
class DecodingPlan:
    """Decoding on a layout.

    Attributes:
        layout: of the ranks.
        num_gpus: of all replicas.
        texts: that are decoded at a time on each replica.
        most_texts: that fit.
        memory: of every pipeline rank.
        num_parameters: elements of the weights of every pipeline rank.
        pass_time: of a pass that computes a block of every text.
        prefill: seconds in which the prompts of all texts of a replica enter.
        num_passes: that a text needs after its prompt.
        new_tokens: of a text.
    """

    layout: ParallelConfig
    num_gpus: int
    texts: int
    most_texts: int
    memory: tuple[DecodingMemory, ...]
    num_parameters: tuple[int, ...]
    pass_time: ForwardTime
    prefill: float
    num_passes: float
    new_tokens: int

    @property
    def worst(self) -> DecodingMemory:
        """Of the rank that needs the most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def replicas(self) -> int:
        """Models that decode texts of their own."""
        return self.layout.data_parallel_size(self.num_gpus)

    @property
    def seconds(self) -> float:
        """From the prompts of a batch to its last tokens."""
        return self.prefill + self.num_passes * self.pass_time.total

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all replicas together."""
        return self.replicas * self.texts * self.new_tokens / self.seconds


def cache_growth(texts: TextsConfig) -> tuple[int, int]:
    """Tokens of a slot that there is room for at the end, and before it last grew."""
    kept, length = texts.prompt_length // texts.block_size * texts.block_size, texts.length
    needs = [kept, *range(kept + texts.block_size, length + texts.block_size, texts.block_size)]
    before = capacity = 0
    for need in needs:
        larger = room_for(min(need, length), capacity)
        before, capacity = (capacity, larger) if larger != capacity else (before, capacity)
    return capacity, before


def cache_bytes(model: ModelConfig, layout: ParallelConfig, num_layers: int, texts: TextsConfig, number: int) -> int:
    """Bytes of the keys, values and roles of some texts on a rank with so many layers."""
    capacity, _ = cache_growth(texts)
    return number * capacity * (num_layers * _layer_bytes(model, layout) + _ROLE_BYTES)


def _layer_bytes(model: ModelConfig, layout: ParallelConfig) -> int:
    """Of the key and the value of a token in a layer."""
    groups = max(model.num_query_groups // layout.tensor_model_parallel_size, 1)
    return 2 * groups * model.kv_channels * number_width(layout)


def decoding_memory(
    setting: Setting, layout: ParallelConfig, rank: PipelineRank, texts: TextsConfig, number: int
) -> DecodingMemory:
    """Bytes of a pipeline rank that decodes so many texts.

    Args:
        setting: model, machine and assumptions.
        layout: of the ranks.
        rank: which layers it holds.
        texts: how long they are.
        number: of texts on a replica.
    """
    model, width = setting.model, number_width(layout)
    cache = cache_bytes(model, layout, rank.num_layers, texts, number)
    grown = cache + number * cache_growth(texts)[1] * _layer_bytes(model, layout)
    imbalance = setting.machine.assumptions.expert_imbalance
    entering = _all_read(_entering(texts, number), texts.prompt_length)
    blocks = _all_read(number * texts.block_size, texts.length)
    of_prompts, of_blocks = (forward_bytes(model, layout, rank, tokens, imbalance) for tokens in (entering, blocks))
    of_block = texts.block_size * model.vocab_size
    logits = min(number * of_block, max(LOGITS_ELEMENTS, of_block)) * (_LOGIT_BYTES + width % 4) * rank.is_last
    # 1 prompts enter beside texts that are nearly done, 2 a pass makes the cache longer, 3 tokens are chosen.
    moments = [(cache, of_prompts, 0), (grown, of_blocks, 0), (cache, 0, logits)]
    found, activations, chosen = max(moments, key=sum)
    return DecodingMemory(
        weights=rank_weights(model, layout, rank).total * width,
        cache=found,
        activations=round(activations),
        logits=chosen,
        reserve=setting.reserve,
    )


def _entering(texts: TextsConfig, number: int) -> int:
    """Tokens of prompts that one pass takes in."""
    return min(number * texts.prompt_length, max(MAX_TOKENS, texts.prompt_length))


def plan_decoding(setting: Setting, layout: ParallelConfig, num_gpus: int, texts: TextsConfig) -> DecodingPlan:
    """Memory and time on a layout that `ParallelConfig.validate` accepts; context ranks have no part in decoding.

    Args:
        setting: model, machine and assumptions.
        layout: of the ranks.
        num_gpus: of all replicas.
        texts: how many, and how long they are.
    """
    ranks = pipeline_ranks(setting.model, layout)
    most = most_texts(setting, layout, texts)
    number = texts.batch_size or max(most, 1)
    computed = number * texts.block_size
    # On average half of the new tokens are there.
    keys = texts.prompt_length + texts.max_new_tokens / 2 + texts.block_size
    kept = sum(cache_bytes(setting.model, layout, rank.num_layers, texts, number) for rank in ranks)
    prompts = _all_read(_entering(texts, number), texts.prompt_length)
    num_prefills = number * texts.prompt_length / prompts.computed
    blocks = math.ceil(texts.max_new_tokens / texts.block_size)
    one_pass = forward_time(setting, layout, num_gpus, Tokens(computed, computed, computed * keys), computed)
    return DecodingPlan(
        layout=layout,
        num_gpus=num_gpus,
        texts=number,
        most_texts=most,
        memory=tuple(decoding_memory(setting, layout, rank, texts, number) for rank in ranks),
        num_parameters=tuple(rank_weights(setting.model, layout, rank).total for rank in ranks),
        pass_time=replace(one_pass, cache=kept / setting.machine.memory_rate),
        prefill=num_prefills * forward_time(setting, layout, num_gpus, prompts, 0.0).total,
        num_passes=blocks * (texts.block_size / texts.tokens_per_pass + 1.0),
        new_tokens=texts.max_new_tokens,
    )


def most_texts(setting: Setting, layout: ParallelConfig, texts: TextsConfig) -> int:
    """Texts of a replica that fit at a time; 0: not one."""

    def fits(number: int) -> bool:
        ranks = pipeline_ranks(setting.model, layout)
        return all(decoding_memory(setting, layout, rank, texts, number).total <= setting.limit for rank in ranks)

    low, high = 0, _MOST_TEXTS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _all_read(tokens: int, length: int) -> Tokens:
    """Prompts of so many tokens together, each of which sees half of its own on average."""
    return Tokens(tokens, tokens, tokens * length / 2.0)
