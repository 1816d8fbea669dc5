"""What a checkpoint brings: the model and the tokenizer, where recipes and command line leave them open.

`open_model`, `bring_model`, `bring_tokenizer` and `fill` are for every command; `evaluation.request` settles with them
what a measurement needs beyond that. `open_config` and `settled` are a training run's, which reads contract.json alone,
one small file: whether the checkpoint is whole is looked at when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from megatron_dllm.checkpoint.folder import is_hf_folder, step_folders
from megatron_dllm.checkpoint.identity import kept_fields
from megatron_dllm.checkpoint.stored_model import StoredModel, read_stored_model
from megatron_dllm.config import EvaluationConfig, ModelConfig, TrainConfig
from megatron_dllm.config.run import HELD_OUT_TOKENS
from megatron_dllm.run.names import CHECKPOINTS, CONTRACT

# A field without a default has ??? in its place.
_DEFAULTS = {field.name: field.default for field in fields(ModelConfig)}
_REQUIRED = [name for name, default in _DEFAULTS.items() if default == MISSING]


def open_model() -> ModelConfig:
    """A model none of whose fields has a value yet, so that whatever has one later was stated."""
    return ModelConfig(**dict.fromkeys(_DEFAULTS, MISSING))


def bring_model(model: Any, brought: ModelConfig, folder: Path, names: Iterable[str]) -> None:
    """Fill in what is open of a model.

    Args:
        model: the section of a DictConfig made from `open_model`; it is changed.
        brought: what the checkpoint brings.
        folder: of the checkpoint.
        names: fields that must not be stated otherwise.

    Raises:
        ValueError: one of them is.
    """
    for name in names:
        value = getattr(brought, name)
        if not OmegaConf.is_missing(model, name) and (stated := _plain(model[name])) != value:
            raise ValueError(
                f"model.{name} ({stated}) differs from the checkpoint {folder} ({value}); leave it out, as the "
                "checkpoint brings the model, or choose the checkpoint that it belongs to."
            )
    fill(model, **{name: getattr(brought, name) for name in _DEFAULTS})


def _plain(value: Any) -> Any:
    """A value of a DictConfig, a group as its dataclass."""
    return OmegaConf.to_object(value) if isinstance(value, DictConfig) else value


def bring_tokenizer(data: Any, tokenizer: Path | None) -> None:
    """Take the checkpoint's tokenizer, if it has one, unless another is named."""
    if data.tokenizer is None and tokenizer is not None:
        data.tokenizer = str(tokenizer)


def fill(section: Any, **values: Any) -> None:
    """Set the values of a DictConfig that are open."""
    for name, value in values.items():
        if OmegaConf.is_missing(section, name):
            section[name] = value


def open_config() -> TrainConfig:
    """The schema that recipes are composed onto: what `settled` fills in has no value yet, so a value was stated."""
    return TrainConfig(model=open_model(), evaluation=EvaluationConfig(num_tokens=MISSING))


def settled(composed: Any) -> Any:
    """A composed configuration with what it leaves open filled in.

    A model whose sizes are not all stated (model=checkpoint) is that of `checkpoint.load`, which then brings the
    tokenizer too unless another is named. Of a run that goes on, the run's own checkpoint stands in for a
    `checkpoint.load` that is gone. Other fields that a recipe leaves out have their defaults.

    Args:
        composed: DictConfig made from `open_config`; it is not changed.

    Raises:
        ValueError: the model is open and there is no checkpoint to bring it, or a field that is stated differs from
            the checkpoint's.
    """
    config = deepcopy(composed)
    model = config.model
    open_fields = [name for name in _DEFAULTS if OmegaConf.is_missing(model, name)]
    if set(_REQUIRED) <= set(open_fields) or (config.checkpoint.load and set(_REQUIRED) & set(open_fields)):
        stored = _stored_model(config)
        bring_model(model, stored.model, stored.folder, kept_fields(_DEFAULTS, config.checkpoint.change_rotary))
        bring_tokenizer(config.data, stored.tokenizer)
    fill(model, **_DEFAULTS)
    fill(config.evaluation, num_tokens=HELD_OUT_TOKENS if config.data.validation else 0)
    return config


def _stored_model(config: Any) -> StoredModel:
    """The model that the run starts from."""
    load = config.checkpoint.load
    if not load:
        raise ValueError(
            "checkpoint.load (null) must name the checkpoint that brings the model (model=checkpoint); give it, or "
            "choose a model recipe."
        )
    places = [Path(load), Path(load) / CHECKPOINTS]
    if not OmegaConf.is_missing(config.run, "name"):
        places.append(Path(config.run.root) / config.run.name / CHECKPOINTS)
    folder = _first_with_contract(places)
    if folder is None:
        remedy = (
            f"convert this Hugging Face folder first: python -m checkpoints_tools.hf_to_mcore --hf {load} --output DIR"
            if is_hf_folder(Path(load))
            else "give a converted checkpoint, a run folder or one of its step_* folders; where another job has yet to "
            "make it, choose a model recipe"
        )
        raise ValueError(
            f"checkpoint.load ({load}) must be a checkpoint, which brings the model (model=checkpoint); {remedy}."
        )
    return read_stored_model(folder)


def _first_with_contract(places: Iterable[Path]) -> Path | None:
    """The first of these folders that is a checkpoint, or else holds some, of which it is the newest."""
    for place in places:
        for folder in (place, *reversed(step_folders(place))):
            if (folder / CONTRACT).is_file():
                return folder
    return None
