"""`generate` of a block-diffusion model: what it takes, how it decodes, and what it refuses.

The rule is LLaDA2.0's threshold decoding (section 5.4). Shapes: b batch, n tokens of the prompts, v vocabulary.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from .block_diffusion_layers import BlockCache

# Other names of what `generate` takes.
SYNONYMS = {"block_length": "block_size", "gen_length": "max_new_tokens", "minimal_topk": "min_tokens_per_step",
            "eos_id": "eos_token_id", "mask_id": "mask_token_id"}
TAKEN = ("max_new_tokens", "max_length", "block_size", "steps", "min_tokens_per_step", "threshold", "do_sample",
         "temperature", "top_p", "top_k", "seed", "eos_token_id", "pad_token_id", "mask_token_id")
# What transformers, its pipelines and LLaDA2's own `generate` may add without asking for anything.
WITHOUT_EFFECT = ("use_cache", "bos_token_id", "eos_early_stop", "tokenizer", "transformers_version",
                  "use_model_defaults")
# Arguments of transformers that ask for nothing at this value; at any other, and without fail by another name, an
# argument would be forgotten in silence and is refused.
OFF = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
       "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0, "no_repeat_ngram_size": 0,
       "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "diversity_penalty": 0.0,
       "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "return_dict_in_generate": False, "output_scores": False,
       "output_logits": False, "output_attentions": False, "output_hidden_states": False, "early_stopping": False,
       "remove_invalid_values": False, "renormalize_logits": False, "synced_gpus": False, "logits_processor": [],
       "stopping_criteria": []}
# A later source that names the one has not asked for the other, which an earlier source names.
INSTEAD_OF = {"max_length": ("max_new_tokens",), "max_new_tokens": ("max_length",), "temperature": ("do_sample",),
              "steps": ("min_tokens_per_step",), "min_tokens_per_step": ("steps",)}
DEFAULT_MAX_NEW_TOKENS = 256
DEFAULT_SEED = 1234


@dataclass(frozen=True)
class BlockDecoding:
    """How prompts are continued.

    Attributes:
        block_size: tokens denoised together.
        max_new_tokens: at most so many are generated; None: `max_length` decides.
        max_length: at most so many tokens of prompt and continuation, padding not counted; None: no such limit.
        threshold: a step keeps every token more probable than this.
        min_tokens_per_step: kept in every step even below the threshold, the most probable first.
        temperature: 0 takes the most probable token; above it, tokens are drawn within `top_p` and `top_k`.
        top_p: probability mass to draw from.
        top_k: tokens to draw from; 0: all.
        seed: of the draws; the prompt in row i takes seed + i.
        eos_token_ids: any of these ends the text.
        pad_token_id: fills up the shorter rows of a batch.
    """

    block_size: int
    max_new_tokens: int | None
    max_length: int | None
    threshold: float
    min_tokens_per_step: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


class BlockGenerationMixin(GenerationMixin):
    """Adds `generate`; the class has a `model` that takes a BlockCache, an `lm_head` and a `config`."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *,
                 input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                 token_type_ids: Tensor | None = None, **arguments: Any) -> Tensor:
        """Continue prompts, block by block.

        The block grid starts at a prompt's first token; the prompt's tail shares the first generated block. Each step
        predicts every masked token of the block and keeps those more probable than `threshold`, at least the
        `min_tokens_per_step` most probable. A finished block is run once more as clean tokens, whose keys and values
        later blocks read. Decoding ends after a block with an eos. The rows of a batch are decoded one after the other:
        each gets the text that it would get alone.

        Args:
            inputs: [b, n] prompts, padded on either side where `attention_mask` is 0.
            generation_config: values for the arguments that are not given; the model's own config comes after it.
            input_ids: [b, n] another name for `inputs`.
            attention_mask: [b, n] 1 for tokens, 0 for padding; None: there is no padding.
            token_type_ids: [b, n] as some tokenizers add them; must be 0.
            arguments: max_new_tokens (256) or gen_length; max_length; block_size or block_length (that of training);
                threshold (0.95); min_tokens_per_step (1), or steps: at most so many steps a block; temperature (0), or
                do_sample for 1; top_p (1); top_k (0: all); seed (1234); eos_token_id or eos_id, one or several;
                pad_token_id; mask_token_id or mask_id, which must be the model's.

        Returns:
            [b, n + m] every row as given, then its continuation up to the first eos, filled up with pad_token_id.

        Raises:
            ValueError: an impossible prompt or value, or an argument that this decoding does not have.
        """
        if inputs is not None and input_ids is not None:
            raise ValueError("inputs and input_ids are two names for the prompts; give one of them.")
        ids = inputs if input_ids is None else input_ids
        how = read_arguments(self.config, _values_of(getattr(self, "generation_config", None)),
                             _values_of(generation_config), arguments)
        rows = read_prompts(ids, attention_mask, token_type_ids, self.config, how)
        new = [self._continue(row, how, how.seed + index) for index, row in enumerate(rows)]
        width = max(len(tokens) for tokens in new)
        return torch.cat([ids, torch.stack([F.pad(row, (0, width - len(row)), value=how.pad_token_id) for row in new])],
                         dim=1)

    def _continue(self, prompt: Tensor, how: BlockDecoding, seed: int) -> Tensor:
        """New tokens [m] after one `prompt` [n], up to the first eos."""
        generator = torch.Generator(device=prompt.device).manual_seed(seed)
        ids, size, end_of_context = prompt.unsqueeze(0), how.block_size, self.config.max_position_embeddings
        limit = how.max_length if how.max_new_tokens is None else len(prompt) + how.max_new_tokens
        limit = min(limit, end_of_context)
        cache = BlockCache()
        if len(prompt) >= size:
            self._commit(ids[:, :len(prompt) // size * size], cache, size)
        while True:
            start = ids.shape[1] // size * size
            end = min(start + size, end_of_context)
            known = ids.shape[1] - start
            block = F.pad(ids[:, start:], (0, end - ids.shape[1]), value=self.config.mask_token_id)
            self._denoise(block[0], known, cache, how, generator)
            ids = torch.cat([ids[:, :start], block], dim=1)
            if ids.shape[1] >= limit or any(token in how.eos_token_ids for token in block[0, known:].tolist()):
                break
            self._commit(block, cache, size)
        generated = ids[0, len(prompt):limit]
        ends = [place + 1 for place, token in enumerate(generated.tolist()) if token in how.eos_token_ids]
        return generated[:ends[0]] if ends else generated

    def _commit(self, ids: Tensor, cache: BlockCache, size: int) -> None:
        """Store keys and values of whole clean blocks `ids` [1, n]; each sees itself and earlier ones."""
        mask = None
        if ids.shape[1] > size:
            block = torch.arange(ids.shape[1], device=ids.device) // size
            mask = (block.unsqueeze(0) <= block.unsqueeze(1))[None, None]
        cache.is_committing = True
        self.model(ids, mask, past_key_values=cache)
        cache.is_committing = False

    def _denoise(self, block: Tensor, known: int, cache: BlockCache, how: BlockDecoding,
                 generator: torch.Generator) -> None:
        """Fill the masked tokens of `block` [n], those from `known` on, in place."""
        masked = torch.arange(known, len(block), device=block.device)
        while len(masked):
            hidden = self.model(block.unsqueeze(0), past_key_values=cache).last_hidden_state
            tokens, confidence = predict(self.lm_head(hidden[0, masked]), self.config.mask_token_id, how, generator)
            is_kept = confidence > how.threshold
            if int(is_kept.sum()) < how.min_tokens_per_step:
                is_kept[confidence.argsort(descending=True, stable=True)[:how.min_tokens_per_step]] = True
            block[masked[is_kept]] = tokens[is_kept]
            masked = masked[~is_kept]


def predict(logits: Tensor, mask_token_id: int, how: BlockDecoding,
            generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose a token for every masked position.

    The confidence is the model's own probability of the token, over the whole vocabulary and at temperature 1.

    Args:
        logits: [m, v] of the masked positions.
        mask_token_id: never chosen.
        how: temperature, top_p and top_k.
        generator: source of randomness.

    Returns:
        [m] int64 tokens, and [m] fp32 confidence.
    """
    logits = logits.float()
    probability = torch.softmax(logits, dim=1)
    if not bool(torch.isfinite(probability).all()):
        raise ValueError("logits (nan or inf) must be finite; the folder has broken weights, or they overflow in "
                         "their precision: load it with dtype=torch.float32 to compare.")
    logits = logits.index_fill(1, torch.tensor([mask_token_id], device=logits.device), float("-inf"))
    if how.temperature == 0.0:
        tokens = logits.argmax(dim=1)
    else:
        ranked, order = (logits / how.temperature).sort(dim=1, descending=True, stable=True)
        if how.top_k:
            ranked[:, how.top_k:] = float("-inf")
        chances = torch.softmax(ranked, dim=1)
        if how.top_p < 1.0:
            chances = chances.masked_fill(chances.cumsum(dim=1) - chances >= how.top_p, 0.0)
        tokens = order.gather(1, torch.multinomial(chances, 1, generator=generator)).squeeze(1)
    return tokens, probability.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _values_of(generation_config: GenerationConfig | None) -> dict[str, Any]:
    """What a GenerationConfig says beyond transformers' defaults."""
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(f"generation_config ({type(generation_config).__name__}) must be a GenerationConfig; give its "
                         "values as arguments.")
    values = {} if generation_config is None else generation_config.to_diff_dict()
    return {name: value for name, value in values.items() if not name.startswith("_")}


def read_arguments(config: Any, *sources: dict[str, Any]) -> BlockDecoding:
    """Check what was asked for and bring it into one form.

    Args:
        config: of the model.
        sources: arguments by name; a later one replaces what an earlier one says.

    Raises:
        ValueError: naming the argument.
    """
    asked: dict[str, Any] = {}
    for source in sources:
        said = _known(source)
        replaced = {other for name in said for other in INSTEAD_OF.get(name, ())} - said.keys()
        if said.get("do_sample") is False:
            replaced |= {"temperature", "top_p", "top_k"}
        asked = {name: value for name, value in asked.items() if name not in replaced} | said
    mask = asked.get("mask_token_id", config.mask_token_id)
    if mask != config.mask_token_id:
        raise ValueError(f"mask_token_id ({mask}) must be the mask token of the model ({config.mask_token_id}), which "
                         "it was trained with; leave it out.")
    size = asked.get("block_size", config.block_length)
    max_new, max_length = asked.get("max_new_tokens"), asked.get("max_length")
    eos = asked.get("eos_token_id", config.eos_token_id)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    pad = asked.get("pad_token_id", config.pad_token_id)
    how = BlockDecoding(
        block_size=size,
        max_new_tokens=DEFAULT_MAX_NEW_TOKENS if max_new is None and max_length is None else max_new,
        max_length=max_length if max_new is None else None,
        threshold=asked.get("threshold", 0.95),
        min_tokens_per_step=_min_tokens(asked, size),
        temperature=_temperature(asked),
        top_p=asked.get("top_p", 1.0),
        top_k=asked.get("top_k", 0),
        seed=asked.get("seed", DEFAULT_SEED),
        eos_token_ids=eos_ids,
        pad_token_id=pad if pad is not None else eos_ids[0] if eos_ids else 0,
    )
    if how.temperature == 0.0 and (how.top_p < 1.0 or how.top_k > 0):
        warnings.warn("top_p and top_k have no effect at temperature 0; give do_sample=True to sample.")
    return how


def _known(source: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one source that ask for something, under their first names."""
    asked: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    for given, value in source.items():
        name = SYNONYMS.get(given, given)
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name not in TAKEN:
            if name in OFF and (list(value) if isinstance(value, list) else value) == OFF[name]:
                continue
            raise ValueError(f"{given} ({value}) is not part of block-diffusion decoding, which takes "
                             f"{', '.join([*TAKEN, *SYNONYMS])}; leave it out.")
        if asked.get(name, value) != value:
            raise ValueError(f"{spellings[name]} ({asked[name]}) and {given} ({value}) are one setting; "
                             "give one of them.")
        _check_value(given, name, value)
        asked[name], spellings[name] = value, given
    return asked


def _check_value(given: str, name: str, value: Any) -> None:
    """Refuse a value that the setting cannot take; `given` is the name it was given by."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "do_sample":
        is_right, rule = isinstance(value, bool), "must be True or False"
    elif name == "eos_token_id":
        is_right = all(map(_is_integer, value if isinstance(value, (list, tuple)) else [value]))
        rule = "must be a token or a list of tokens"
    elif name == "temperature":
        is_right, rule = is_number and 0.0 <= value < math.inf, "must be finite and not negative"
    elif name in ("threshold", "top_p"):
        is_right, rule = is_number and 0.0 < value <= 1.0, "must lie in (0, 1]"
    elif name in ("top_k", "seed", "pad_token_id", "mask_token_id"):
        is_right, rule = _is_integer(value) and 0 <= value < 2**63, "must be 0 or a positive integer"
    else:
        is_right, rule = _is_integer(value) and value > 0, "must be a positive integer"
    if not is_right:
        raise ValueError(f"{given} ({value}) {rule}; leave it out for the default.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _min_tokens(asked: dict[str, Any], block_size: int) -> int:
    """Tokens that every step keeps at least, given as such or by the steps of a block."""
    if "steps" not in asked:
        return asked.get("min_tokens_per_step", 1)
    if "min_tokens_per_step" in asked:
        raise ValueError(f"steps ({asked['steps']}) and min_tokens_per_step ({asked['min_tokens_per_step']}) both say "
                         "how many tokens a step keeps at least; give one of them.")
    return math.ceil(block_size / asked["steps"])


def _temperature(asked: dict[str, Any]) -> float:
    """0 unless the user samples, by do_sample or by a temperature."""
    temperature, do_sample = asked.get("temperature"), asked.get("do_sample")
    if do_sample is None:
        return float(temperature or 0.0)
    if do_sample and temperature == 0.0:
        raise ValueError("temperature (0) must be above 0 to sample (do_sample=True); leave do_sample out for the most "
                         "probable tokens.")
    if do_sample:
        return 1.0 if temperature is None else float(temperature)
    if temperature:
        warnings.warn(f"temperature ({temperature}) has no effect with do_sample=False; give do_sample=True to sample.")
    return 0.0


def read_prompts(ids: Any, attention_mask: Tensor | None, token_type_ids: Tensor | None, config: Any,
                 how: BlockDecoding) -> list[Tensor]:
    """The prompts of a batch without their padding.

    Args:
        ids: [b, n] int64 prompts.
        attention_mask: [b, n] 0 for padding, or None.
        token_type_ids: [b, n] zeros, or None.
        config: of the model.
        how: the prompts are to be continued.

    Returns:
        [n_i] each.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"inputs ({shape}) must be prompts [b, n] of token ids, n > 0; write "
                         "generate(**tokenizer(text, return_tensors='pt')).")
    if token_type_ids is not None and bool(token_type_ids.any()):
        raise ValueError("token_type_ids must be 0: the model has one type of token; leave them out.")
    if attention_mask is None:
        edges = ids[:, [0, -1]]
        if len(ids) > 1 and bool((edges == how.pad_token_id).any()):
            raise ValueError(f"attention_mask (None) must mark the padding: a prompt of the batch begins or ends with "
                             f"the padding token ({how.pad_token_id}); pass the tokenizer's attention_mask on.")
        attention_mask = torch.ones_like(ids)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask ({shape}) must have the shape of inputs ({list(ids.shape)}); pass the "
                         "tokenizer's on.")
    return [_read_prompt(row, mask.bool(), config, how.max_length, index)
            for index, (row, mask) in enumerate(zip(ids, attention_mask.to(ids.device), strict=True))]


def _read_prompt(row: Tensor, is_token: Tensor, config: Any, max_length: int | None, index: int) -> Tensor:
    """One prompt of `row` [n] and `is_token` [n] bool, checked."""
    prompt, places = row[is_token], is_token.nonzero().squeeze(1)
    if not len(prompt) or int(places[-1] - places[0]) + 1 != len(prompt):
        raise ValueError(f"attention_mask of row {index} must be ones in one piece, with padding before or after; it "
                         f"has {len(prompt)} ones.")
    if len(prompt) >= config.max_position_embeddings:
        raise ValueError(f"inputs of row {index} ({len(prompt)} tokens) must be shorter than max_position_embeddings "
                         f"({config.max_position_embeddings}); shorten the prompt.")
    if max_length is not None and len(prompt) >= max_length:
        raise ValueError(f"max_length ({max_length}) must exceed the prompt of row {index} ({len(prompt)} tokens), "
                         "which it counts; raise it, or give max_new_tokens instead.")
    if int(prompt.min()) < 0 or int(prompt.max()) >= config.vocab_size:
        raise ValueError(f"inputs of row {index} hold token {int(prompt.max())}, the vocabulary ends at "
                         f"{config.vocab_size - 1}; use the tokenizer of this folder.")
    if bool((prompt == config.mask_token_id).any()):
        raise ValueError(f"inputs of row {index} hold the mask token ({config.mask_token_id}); take it out of "
                         "the text.")
    return prompt
