"""Hydra composition of the recipes onto the schema, and errors that name the nearest valid key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dllm.checkpoint.brought import open_config, settled
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.command_line import entry_of_dict, null_part, type_of_key, typed_words
from megatron_dllm.config.fitting import fitted
from megatron_dllm.config.recipe_source import RECIPES, recipe_names, register, split_folder
from megatron_dllm.config.rules import check

SWEEP_FLAGS = ("--multirun", "-m")


def register_schemas() -> None:
    """Make the dataclasses known to Hydra; recipes/train.yaml starts from `train_schema`."""
    register()
    ConfigStore.instance().store(name="train_schema", node=open_config())


def schema_keys(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of every field below `schema`; a dict's entries appear as `name.*`."""
    keys: list[str] = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        key, hint = prefix + item.name, hints[item.name]
        keys.append(key)
        is_dict = get_origin(hint) is dict
        for part in get_args(hint) or (hint,):  # X, X | None, dict[str, X]
            if is_dataclass(part):
                keys += schema_keys(part, f"{key}.*." if is_dict else f"{key}.")  # type: ignore[arg-type]
    return keys


def _nearest(word: str, candidates: Iterable[str]) -> str:
    """The candidate most like `word`, comparing whole dotted names and last parts."""
    candidates = list(candidates)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    if close:
        return close[0]
    by_last = {c.rsplit(".", 1)[-1]: c for c in candidates}
    close = difflib.get_close_matches(word.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.4)
    return by_last[close[0]] if close else ""


def _groups(recipes: Path) -> dict[str, list[str]]:
    groups = {folder.name for root in (recipes, RECIPES) for folder in root.iterdir() if folder.is_dir()}
    return {group: recipe_names(group, [recipes]) for group in sorted(groups)}


_WORD = re.compile(
    r"\+{0,2}(?P<key>[A-Za-z_@][\w/@.-]*[\w])=(?P<value>.*)|~(?P<left_out>[A-Za-z_][\w/@.]*)(=.*)?", re.DOTALL
)
_RECIPES = re.compile(r"\[?\w[\w./-]*(,\s*\w[\w./-]*)*\]?")


def _check_words(words: Sequence[str], schema: type, groups: dict[str, list[str]]) -> None:
    """Refuse what Hydra's grammar would stumble over, a recipe that is no name, and a new key that nothing reads."""
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None or (not word.isascii() and not word.partition("=")[0].isascii()):
            raise ValueError(f"{word!r} is not a setting; write key=value, without spaces around the equal sign.")
        key, value = match["key"], match["value"]
        if key is None or key.startswith(("hydra", "@")):
            continue
        if key in groups:
            is_name = _RECIPES.fullmatch(value) is not None and ".." not in value and value != "null"
            check(is_name or value.startswith("{"), _not_a_recipe(key, value, groups))
        elif word.startswith("+") and key.partition("@")[0] not in groups and type_of_key(schema, key) is None:
            raise ValueError(_not_a_key(key, schema, groups))


def _not_a_recipe(group: str, name: str, groups: dict[str, list[str]]) -> str:
    options = groups.get(group, [])
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.3)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{group} ({name}) is not a recipe; {hint}There are: {', '.join(options) or 'none'}."


def _not_a_key(key: str, schema: type, groups: Iterable[str]) -> str:
    near = _nearest(re.sub(r"(stages|jobs)\.[^.]+\.", r"\1.*.", key), [*schema_keys(schema), *groups])
    if not near or near == key:
        return f"{key} is not a key of the configuration; python -m megatron_dllm.train --help names those there are."
    return f"{key} is not a key of the configuration; did you mean {near.replace('*', 'NAME')}?"


def _one_sentence(message: str) -> str:
    """The first line of what Hydra says; the others are its grammar and where it looked."""
    line = " ".join(message.strip().splitlines()[0].split()).removeprefix("In 'train': ")
    unreadable = re.match(r"(?:LexerNoViableAltException:|no viable alternative at input|mismatched input) *(.*)", line)
    if unreadable:
        return f"{unreadable[1]} cannot be read; close every bracket and quote, and quote a value that holds them."
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _explain(error: Exception, overrides: Sequence[str], recipes: Path, schema: type) -> str:
    """One sentence for a composition error: what is unknown, and the nearest name that exists."""
    message = str(error)
    if error.__cause__ is not None and "Error merging" in message:
        message = f"{message}: {str(error.__cause__).splitlines()[0]}"
    groups = _groups(recipes)
    missing = re.search(r"Could not find '(?P<group>[\w/]+)/(?P<name>[^'/]+)'", message)
    if missing:
        group, name = missing["group"], missing["name"]
        return _not_a_recipe(group, name, groups)
    stated = re.search(r"full_key: (\S+)", message)
    full_key = stated[1] if stated else ""
    names = {o.split("=", 1)[0].lstrip("+~") for o in overrides}
    unknown = re.search(r"Could not override '([^']+)'", message) or re.search(r"Key '([^']+)' (?:is )?not in", message)
    key = unknown[1] if unknown else ""
    if not key:
        return _one_sentence(message)
    if full_key.endswith(key):
        key = full_key
    elif key not in names:
        key = next((n for n in names if key in n), key)
    entry = entry_of_dict(schema, key)
    if entry is not None and type_of_key(schema, key) is not None:
        return f"{entry[0]} has no {entry[1]}; +{entry[0]}.{entry[1]}={{...}} adds one, behind those that are there."
    recipe = re.search(r"In '([^']+)'", message)
    if recipe and recipe[1].split("/")[0] == key:
        return (
            f"recipe {recipe[1]} puts its values under {key}, which is not a key of the configuration; begin the "
            "file with the line '# @package _global_'."
        )
    return _not_a_key(key, schema, groups)


def compose_dict(
    overrides: Sequence[str], config_name: str = "train", recipes: Path = RECIPES, schema: type = TrainConfig
) -> Any:
    """Compose recipes and overrides into a DictConfig.

    Raises:
        ValueError: an unknown group, recipe or key, naming the nearest valid one; a value of a wrong type.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        _check_words(overrides, schema, _groups(recipes))
        with initialize_config_dir(str(recipes), version_base="1.3"):
            return compose(config_name=config_name, overrides=typed_words(schema, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides, recipes, schema)) from error
    except (AssertionError, AttributeError) as error:  # how OmegaConf meets a value inside a group that is null
        inside = (null_part(schema, word.partition("=")[0].lstrip("+")) for word in overrides)
        part = next((name for name in inside if name), None)
        if part is None:
            raise
        raise ValueError(
            f"{part} (null) has no values that a command line could change; give it in a recipe."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = " ".join(str(error).split())
        raise ValueError(f"a recipe is not YAML: {place}; correct that place.") from error


def to_train_config(config: Any) -> TrainConfig:
    """Turn a composed DictConfig into the dataclass; where the DictConfig ends.

    What the recipes leave open is taken from the checkpoint here (`checkpoint.brought`), and the schedule is fitted to
    the model (`config.fitting`), for every command alike.

    Raises:
        ValueError: a required value is missing, named with its full key, or differs from the checkpoint that brings it.
    """
    try:
        result = OmegaConf.to_object(settled(config))
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error)
        raise ValueError(f"{key} is required and has no value; set it in the recipe or on the command line.") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise ValueError(f"{key} cannot be resolved: {_one_sentence(str(error))}") from error
    except RecursionError as error:
        raise ValueError("a value refers to itself through ${...}; give it in full.") from error
    if not isinstance(result, TrainConfig):
        raise ValueError("The configuration does not start from train_schema; begin its defaults with it.")
    result.schedule = fitted(result.schedule, result.model.max_position_embeddings)
    return result


def compose_train_config(overrides: Sequence[str], config_name: str = "train", recipes: Path = RECIPES) -> TrainConfig:
    """Compose and convert in one go: what the entry points and the launcher call."""
    return to_train_config(compose_dict(overrides, config_name, recipes))


def prepare_command_line(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra should read it: every text and number as it was typed (`config.command_line`).

    It is composed once before Hydra does it, so that a typo ends in one sentence that names the nearest key. Sweeps, a
    configuration of the user's own (`--config-name`) and Hydra's other flags are left to Hydra.

    Raises:
        ValueError: with that sentence.
    """
    is_sweep = any(word in SWEEP_FLAGS for word in arguments)
    words = typed_words(TrainConfig, arguments, is_sweep)
    folder, rest = split_folder(words)
    if is_sweep or any(word.startswith(("-", "hydra", "+hydra")) for word in rest):
        return words
    compose_dict(rest, recipes=folder)
    return words
