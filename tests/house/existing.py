"""What exists in the project, asked by name: the other half of the test of README and docs."""

from __future__ import annotations

import ast
import difflib
import re
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from launch.chain import LAUNCH_KEYS
from launch.jobs import LaunchConfig
from megatron_dllm.compose import schema_keys
from megatron_dllm.config import GenerateConfig, TrainConfig
from megatron_dllm.config.band import BandConfig
from megatron_dllm.config.evaluate import SHORT_NAMES, EvaluateConfig
from megatron_dllm.config.harness import HarnessConfig
from megatron_dllm.config.needle import NeedleConfig
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.config.study import StudyConfig
from tests.house.mentions import FOLDERS, PACKAGE, Mention

# What our pages name of others: flags of torchrun, SLURM and pip; arguments of transformers and torch; a key of Hydra.
FOREIGN_FLAGS = (
    *("--shutdown-timeout", "--nproc_per_node", "--test-only", "--requeue", "--switches", "--exclude"),
    *("--index-url", "--model"),
)
FOREIGN_KEYS = ("trust_remote_code", "torch.load", "defaults")
# What the files are called that docs have their reader write: recipes/cluster/mine.yaml.
READERS = "mine"
HYDRA_FLAGS = ("--multirun", "--help", "--config-dir", "--config-name")
TRAINING = (
    "megatron_dllm.train",
    "megatron_dllm.evaluate",
    "megatron_dllm.band",
    "megatron_dllm.harness",
    "megatron_dllm.plan",
)
LAUNCHING = ("launch/submit.py", "launch/local.py")


class Existing:
    """The project in a folder, and what is wrong with a mention of it.

    Args:
        root: top folder of the project.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def problem(self, mention: Mention, text: Path) -> str | None:
        """One sentence if `mention`, found in the file `text`, names nothing that exists; else None."""
        return getattr(self, f"_{mention.kind}")(mention, text)

    def _module(self, mention: Mention, text: Path) -> str | None:
        try:
            exists = find_spec(mention.name) is not None
        except ModuleNotFoundError:
            exists = False
        return None if exists else f"{mention.name} is no module"

    def _script(self, mention: Mention, text: Path) -> str | None:
        return self._path(mention, text)

    def _target(self, mention: Mention, text: Path) -> str | None:
        found = re.search(rf"^{re.escape(mention.name)}:", self._makefile, re.MULTILINE)
        return None if found else f"make {mention.name}: the Makefile has no such target"

    def _variable(self, mention: Mention, text: Path) -> str | None:
        found = re.search(rf"^{mention.name} \?=", self._makefile, re.MULTILINE)
        return None if found else f"{mention.name}= is no variable of the Makefile"

    def _flag(self, mention: Mention, text: Path) -> str | None:
        if mention.name in FOREIGN_FLAGS and not mention.program:
            return None
        if mention.program.startswith(PACKAGE) and mention.program in (*TRAINING, "megatron_dllm.generate"):
            known = set(HYDRA_FLAGS)
        elif not mention.program:
            known = self._all_flags
        elif not (self.root / self._source(mention.program)).is_file():
            return None  # Another program's, such as pytest's.
        else:
            known = {*self._flags_of_program(self.root / self._source(mention.program)), "--help"}
            known |= {"--config-dir"} if mention.program in LAUNCHING else set()
        return None if mention.name in known else f"{mention.program} has no flag {mention.name}"

    def _key(self, mention: Mention, text: Path) -> str | None:
        key = re.sub(r"(^|\.)stages\.[^.]+(?=\.|$)", r"\1stages.*", mention.name)
        if mention.program not in self._keys or key in FOREIGN_KEYS or key.startswith("hydra."):
            return None
        known = self._keys[mention.program]
        if key in known or key.removesuffix(".*") in known or re.sub(r"\.\w+$", ".*", key) in known:
            return None
        if not mention.program and self._is_module_or_file(key):
            return None
        near = difflib.get_close_matches(key, known, n=1)
        return f"{mention.name} is no key{f' of {mention.program}' if mention.program else ''}; nearest: {near}"

    def _recipe(self, mention: Mention, text: Path) -> str | None:
        group, name = mention.name.split("=", 1)
        folder = self.root / "recipes" / group
        if mention.program not in ("", *TRAINING, *LAUNCHING) or not folder.is_dir():
            return None
        folders = [folder]
        if group == "experiment" and mention.program not in TRAINING:
            folders.append(self.root / "recipes" / "chain")
        exists = any((place / f"{name}.yaml").is_file() for place in folders)
        return None if exists or name == READERS else f"{mention.name}: {group} has no such recipe"

    def _path(self, mention: Mention, text: Path) -> str | None:
        path, _, function = mention.name.partition("::")
        found = [self.root / path] if (self.root / path).exists() else self._glob(path)
        if not found:
            return None if path.endswith(f"/{READERS}.yaml") else f"{path} does not exist"
        if function and not re.search(rf"^def {function}\(", found[0].read_text(), re.MULTILINE):
            return f"{path} has no function {function}"
        return None

    def _link(self, mention: Mention, text: Path) -> str | None:
        return None if (text.parent / mention.name).exists() else f"{mention.name}: the link leads nowhere"

    def _glob(self, path: str) -> list[Path]:
        places = [self.root / folder for folder in FOLDERS]
        if path.startswith("**/"):
            return [self.root / path[3:]] * (self.root / path[3:]).exists() or [
                file for place in places for file in place.glob(path)
            ]
        return list(self.root.glob(path)) if "*" in path else []

    def _is_module_or_file(self, dotted: str) -> bool:
        path = dotted.replace(".", "/")
        places = [self.root / prefix / path for prefix in ("", PACKAGE)]
        return any(place.with_name(f"{place.name}.py").is_file() or place.is_dir() for place in places)

    @staticmethod
    def _source(program: str) -> str:
        return program if program.endswith(".py") else f"{program.replace('.', '/')}.py"

    def _flags_of_program(self, source: Path) -> set[str]:
        """The flags of a program, those of a parser that it imports (`question_parser`) too."""
        sources = [source]
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and any(name.name.endswith("_parser") for name in node.names):
                sources.append(self.root / self._source(str(node.module)))
        return {flag for one in sources for flag in self._flags_of(one)}

    @staticmethod
    def _flags_of(source: Path) -> set[str]:
        """The flags that a program gives to `add_argument`, read from its source."""
        calls = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
        words = [arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)]
        return {word for word in words if isinstance(word, str) and word.startswith("--")}

    @cached_property
    def _all_flags(self) -> set[str]:
        folders = ("megatron_dllm", "checkpoints_tools", "launch", "benchmarks", "examples")
        sources = [file for folder in folders for file in (self.root / folder).rglob("*.py")]
        return {*HYDRA_FLAGS, *(flag for source in sources for flag in self._flags_of(source))}

    @cached_property
    def _makefile(self) -> str:
        return (self.root / "Makefile").read_text()

    @cached_property
    def _keys(self) -> dict[str, set[str]]:
        """Known keys by program; under "" those of any."""
        groups = {folder.name for folder in (self.root / "recipes").iterdir() if folder.is_dir()}
        training = {*schema_keys(TrainConfig), *groups}
        launching = {*schema_keys(LaunchConfig), *LAUNCH_KEYS, *training, "inputs.*"}
        generating = {*schema_keys(GenerateConfig), *schema_keys(StudyConfig)}
        return {
            **dict.fromkeys(TRAINING, training),
            "megatron_dllm.evaluate": {*training, *schema_keys(EvaluateConfig), *SHORT_NAMES},
            "megatron_dllm.band": {*training, *schema_keys(BandConfig), *SHORT_NAMES},
            "megatron_dllm.plan": {*training, *schema_keys(PlanConfig)},
            "megatron_dllm.harness": {*training, *schema_keys(HarnessConfig), *SHORT_NAMES},
            "megatron_dllm.needle": {*training, *schema_keys(NeedleConfig), *SHORT_NAMES},
            **dict.fromkeys(LAUNCHING, launching),
            "megatron_dllm.generate": set(schema_keys(GenerateConfig)),
            "megatron_dllm.study": set(schema_keys(StudyConfig)),
            "": {
                *training,
                *launching,
                *generating,
                *schema_keys(HarnessConfig),
                *SHORT_NAMES,
                *schema_keys(PlanConfig),
                *(key.rsplit(".", 1)[-1] for key in launching),
            },
        }
