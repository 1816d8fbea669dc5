"""Where Hydra finds recipes: the user's folders first, the shipped ones behind them; numbers as people write them.

Hydra lets a program add a kind of config source and arrange the search path (its plugin interface); both are
registered by `register`. So a user's folder adds to the shipped recipes instead of replacing them, and
`num_tokens: 1e9` is a whole number, which YAML takes for a fraction.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath, SearchPathElement
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from megatron_dllm.config.rules import check

log = logging.getLogger(__name__)
# In a checkout beside the package; an installed package has them inside.
_CHECKOUT, _INSTALLED = Path(__file__).resolve().parents[2] / "recipes", Path(__file__).resolve().parents[1] / "recipes"
RECIPES = _CHECKOUT if (_CHECKOUT / "train.yaml").is_file() else _INSTALLED
# Hydra's own flag, which every command that reads recipes has.
CONFIG_DIR = ("--config-dir", "-cd")
_SHIPPED = "megatron_dllm"
_FILE = "file://"


class RecipeSource(FileConfigSource):
    """Hydra's source of YAML files, with integral fractions (1e9) read as whole numbers."""

    @staticmethod
    def scheme() -> str:
        """The word before :// in Hydra's search path."""
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one recipe."""
        result = super().load_config(config_path)
        content = OmegaConf.to_container(result.config, resolve=False)
        result.config = OmegaConf.create(whole_numbers(content))
        return result


class RecipeSearchPath(SearchPathPlugin):
    """The user's folders in the order of the command line, then the shipped recipes."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Rearrange Hydra's search path in place."""
        elements = search_path.get_path()
        is_folder = [e.path is not None and ("://" not in e.path or e.path.startswith(_FILE)) for e in elements]
        folders = [Path(e.path.removeprefix(_FILE)) for e, is_one in zip(elements, is_folder, strict=True) if is_one]
        mine = [folder for folder in dict.fromkeys(reversed(folders)) if folder.resolve() != RECIPES]
        others = [e for e, is_one in zip(elements, is_folder, strict=True) if not is_one]
        elements[:] = [
            *(SearchPathElement("user", f"{RecipeSource.scheme()}://{folder}") for folder in mine),
            SearchPathElement(_SHIPPED, f"{RecipeSource.scheme()}://{RECIPES}"),
            *others,
        ]


def user_folder(path: str | Path) -> Path:
    """The folder of recipes that --config-dir names, which adds to the shipped ones.

    Raises:
        ValueError: it is not a folder.
    """
    folder = Path(path).absolute()
    check(folder.is_dir(), f"--config-dir ({path}) must be a folder of recipes, which adds to the shipped ones.")
    return folder


def split_folder(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder of recipes that a command line names (the shipped ones where it names none), and its other words.

    Raises:
        ValueError: what it names is not a folder.
    """
    folder, rest, others = RECIPES, list[str](), iter(words)
    for word in others:
        flag, equals, value = word.partition("=")
        if flag in CONFIG_DIR:
            folder = user_folder(value if equals else next(others, ""))
        else:
            rest.append(word)
    return folder, rest


def register() -> None:
    """Make both known to Hydra; registering again does nothing."""
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)


def whole_numbers(content: Any) -> Any:
    """A recipe's content with integral fractions of at least 1 as ints; a key that holds a fraction takes both."""
    if isinstance(content, dict):
        return {key: whole_numbers(value) for key, value in content.items()}
    if isinstance(content, list):
        return [whole_numbers(value) for value in content]
    is_integral = isinstance(content, float) and abs(content) >= 1.0 and content.is_integer()
    return int(content) if is_integral else content


def recipe_names(group: str, folders: list[Path] | tuple[Path, ...] = ()) -> list[str]:
    """Names of a group's recipes in the user's folders and among the shipped ones, sorted."""
    return sorted({path.stem for folder in (*folders, RECIPES) for path in (folder / group).glob("*.yaml")})
