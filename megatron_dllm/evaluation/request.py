"""What an evaluation will measure: the words of the command line, and from the checkpoint whatever they leave open.

Model and tokenizer are filled in as for every command, by `checkpoint.brought`. What only a measurement takes from its
weights is settled here: block sizes, context, precision, block grid, and whether it is an ELBO or an exact NLL.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from megatron_dllm.checkpoint.brought import bring_model, bring_tokenizer, fill, open_model
from megatron_dllm.checkpoint.identity import IDENTITY, ROTARY, kept_fields
from megatron_dllm.checkpoint.weights_folder import WeightsFolder, read_weights_folder
from megatron_dllm.config import DataConfig, EvaluationConfig, ModelConfig, ParallelConfig, StageConfig
from megatron_dllm.config.evaluate import LONGEST_CONTEXT, EvaluateConfig
from megatron_dllm.config.rules import check
from megatron_dllm.config.run import HELD_OUT_TOKENS
from megatron_dllm.evaluation.elbo import diffusion_names
from megatron_dllm.hf.special_tokens import settle_special_tokens
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from megatron_dllm.model.objective import AR
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.run.stream import check_writable

_STAGE = "evaluation"
# Named as the training corpus of a measurement that reads none.
_NO_CORPUS = "requests"


@dataclass(frozen=True)
class Request:
    """An evaluation with nothing left open.

    Attributes:
        config: validated; its schedule is one stage that stands for the measurement.
        weights: that are measured.
        names: block sizes as text, or "ar".
    """

    config: EvaluateConfig
    weights: WeightsFolder
    names: tuple[str, ...]


def open_config(schema: type[EvaluateConfig] = EvaluateConfig) -> EvaluateConfig:
    """The schema that the command line is composed onto: what the checkpoint may fill in has no value yet."""
    return schema(
        model=open_model(),
        data=DataConfig(block_origin=MISSING),
        parallel=ParallelConfig(precision=MISSING),
        evaluation=EvaluationConfig(block_sizes=MISSING, num_tokens=MISSING),
    )


def read_request(composed: Any, world_size: int) -> Request:
    """Read the checkpoint, fill in what the command line leaves open, and check the whole.

    Args:
        composed: DictConfig made from `open_config`; it is not changed.
        world_size: number of ranks.

    Raises:
        ValueError: checkpoint.load or data.validation is missing, or a value that cannot work or that contradicts the
            checkpoint.
    """
    load, validation = composed.checkpoint.load, composed.data.validation
    if not load or not validation:
        raise ValueError(
            f"checkpoint.load ({load}) and data.validation ({validation}) must be set: name the checkpoint (of a run, "
            "of a tool, or an HF folder) and the held-out corpus."
        )
    request = settle(composed, open_weights(composed), world_size)
    if not request.config.evaluation.num_tokens:
        raise ValueError("evaluation.num_tokens (0) measures nothing; give a number of tokens, or leave it out.")
    return request


def open_weights(composed: Any) -> WeightsFolder:
    """What checkpoint.load names.

    Raises:
        ValueError: nothing, or nothing that can be read as a model.
    """
    load = composed.checkpoint.load
    if not load:
        raise ValueError(
            f"checkpoint.load ({load}) must be set: name a run, one of its step_* folders, or an HF folder."
        )
    if not Path(load).is_dir():
        raise ValueError(f"checkpoint.load ({load}) is not a folder; give an HF folder, a run or one of its step_*.")
    return read_weights_folder(Path(load))


def settle(composed: Any, weights: WeightsFolder, world_size: int) -> Request:
    """Fill in what the command line leaves open, and check the whole.

    Args:
        composed: DictConfig made from a schema as `open_config` makes it; it is not changed.
        weights: of the checkpoint.
        world_size: number of ranks.

    Raises:
        ValueError: a value that cannot work or that contradicts the checkpoint.
    """
    config = _filled(composed, weights, world_size)
    config.validate(world_size)
    names = diffusion_names(config.evaluation) if weights.is_diffusion else [AR]
    return Request(config, weights, tuple(names))


def settle_questions(composed: Any, world_size: int) -> Request:
    """The same for a command that asks in words, at one block size, and measures no corpus.

    Args:
        composed: DictConfig with a `block_size`, null for the checkpoint's own; it is not changed.
        world_size: number of ranks.

    Raises:
        ValueError: what `settle` refuses, or no tokenizer.
    """
    config = deepcopy(composed)
    config.evaluation.num_tokens = 0
    # An experiment that is named for its layout has sizes of its own.
    config.evaluation.block_sizes = MISSING if config.block_size is None else [config.block_size]
    request = settle(config, open_weights(config), world_size)
    check(
        request.config.data.tokenizer is not None,
        f"data.tokenizer (null) must name a folder: there is none beside {request.weights.folder}.",
    )
    return request


def open_target(request: Request, name: str, describe: Callable[[Path], str]) -> Path:
    """Where the result goes: a place that can be written and has no result yet, unless that may be replaced.

    Args:
        request: whose `output` is the place, or else a file beside the weights.
        name: of that file.
        describe: says what an earlier result is.

    Raises:
        ValueError: saying which of the two it is not.
    """
    config = request.config
    has_changed = any(getattr(config.model, name) != getattr(request.weights.model, name) for name in ROTARY)
    if has_changed and not config.output:
        raise ValueError(
            "output (null) must name a file with checkpoint.change_rotary (true): beside the weights, the result of "
            "other rotary angles would pass for the checkpoint's own; give output=FILE."
        )
    target = Path(config.output) if config.output else request.weights.folder / name
    check_writable(target)
    if target.exists() and not config.overwrite:
        raise ValueError(
            f"{target} exists ({describe(target)}); nothing is overwritten: give overwrite=true to replace it, or "
            "output=FILE to write elsewhere."
        )
    return target


def _filled(composed: Any, weights: WeightsFolder, world_size: int) -> EvaluateConfig:
    config = deepcopy(composed)
    model = _model(config.model, weights)
    bring_model(config.model, model, weights.folder, kept_fields(IDENTITY, config.checkpoint.change_rotary))
    context_length = weights.context_length or min(model.max_position_embeddings, LONGEST_CONTEXT)
    fill(config.run, name=_STAGE)
    fill(config.data, train=config.data.validation or _NO_CORPUS, block_origin=weights.block_origin or "document")
    fill(config.schedule, context_length=context_length)
    # FP8 is a way to train: its weights are bf16.
    precision = "bf16" if weights.precision == "fp8" else weights.precision
    fill(config.parallel, precision=precision or ("bf16" if DeviceFacts.here().is_cuda else "fp32"))
    fill(config.evaluation, block_sizes=[weights.block_size], num_tokens=HELD_OUT_TOKENS)
    origin = weights.block_origin or config.data.block_origin
    if weights.is_diffusion and config.data.block_origin != origin:
        raise ValueError(
            f"data.block_origin ({config.data.block_origin}) differs from that of the diffusion weights "
            f"{weights.folder} ({origin}); leave it out, or give the grid they were trained on."
        )
    bring_tokenizer(config.data, weights.tokenizer)
    # Before the values take part in anything: what is wrong is called by the name that the user gave it.
    settings: Any = OmegaConf.to_object(config.evaluation)
    settings.validate(config.schedule.context_length, has_validation=True)
    config.schedule.stages = {_STAGE: _stage(config, weights, world_size)}
    try:
        result = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ValueError(
            f"{getattr(error, 'full_key', None) or error} is required and has no value; give it."
        ) from None
    assert isinstance(result, EvaluateConfig), "the schema is of that class"
    return result


def _model(stated: Any, weights: WeightsFolder) -> ModelConfig:
    """The model of the weights, with the special tokens that an autoregressive HF folder leaves open."""
    if not weights.is_hf or weights.is_diffusion:
        return weights.model
    mask = None if OmegaConf.is_missing(stated, "mask_token_id") else stated.mask_token_id
    return settle_special_tokens(weights.model, TokenizerFiles(weights.folder), mask)


def _stage(config: Any, weights: WeightsFolder, world_size: int) -> StageConfig:
    """A stage with the rows of the measurement, so that layout and rows are checked as those of training are."""
    rows = config.evaluation.micro_batch_size
    virtual = config.parallel.pipeline_model_parallel_size
    return StageConfig(
        objective="block_diffusion" if weights.is_diffusion else AR,
        block_size=config.evaluation.block_sizes[0] if weights.is_diffusion else 1,
        num_tokens=config.evaluation.num_tokens or 1,
        global_batch_size=rows * world_size * virtual,
        micro_batch_size=rows,
        learning_rate=1.0,
        shift=weights.shift,
    )
