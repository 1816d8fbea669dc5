"""The demo's chain in small, job after job in ranks of this test session: no program is started anew.

The jobs are those of recipes/chain/tiny_demo.yaml, with a smaller model, less text and fewer steps. Each runs as
`python -m MODULE ARGUMENTS` would, on as many ranks as the launcher would give it.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.ranks import run_ranks
from launch.chain import compose_chain
from launch.freeze import freeze_job, rank_arguments
from megatron_dllm.compose import RECIPES

ROOT = RECIPES.parent
VOCAB_SIZE = 512
# Heads of 8 instead of 32; as many layers and experts, so that every kind of tensor is there.
MODEL = {
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "kv_channels": 8,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "vocab_size": VOCAB_SIZE,
}
VALIDATION_TOKENS = 600


def small_recipes(folder: Path) -> Path:
    """Write the project's recipes with a chain of seconds into a new folder."""
    shutil.copytree(RECIPES, folder)
    _change(folder / "model" / "tiny_moe.yaml", MODEL)
    for name, tokens in (("tiny_ar", 8_000), ("tiny_wsd", 4_200)):
        path = folder / "schedule" / f"{name}.yaml"
        stages = list(OmegaConf.load(path).stages)
        _change(path, {f"stages.{stage}.num_tokens": tokens for stage in stages})
        _change(path, {f"stages.{stage}.lr_warmup_tokens": 0 for stage in stages})
    for name in ("tiny_base", "tiny_convert"):
        _change(folder / "experiment" / f"{name}.yaml", {"evaluation.num_tokens": VALIDATION_TOKENS})
    _change(folder / "experiment" / "tiny_convert.yaml", {"checkpoint.save_interval_tokens": 6000})
    _change(folder / "schedule" / "tiny_cap.yaml", {"stages.cap.num_tokens": 2_100})
    _shorten_tools(folder / "chain" / "tiny_demo.yaml")
    return folder


def _change(path: Path, values: dict[str, Any]) -> None:
    """Set values, by their dotted names, of a recipe that has them; its first line says where it belongs."""
    recipe = OmegaConf.load(path)
    for name, value in values.items():
        OmegaConf.update(recipe, name, value)
    header = [line for line in path.read_text().splitlines() if line.startswith("# @package")]
    path.write_text("\n".join([*header, OmegaConf.to_yaml(recipe)]))


def _shorten_tools(path: Path) -> None:
    """Give the chain's tools less to do. The measuring one reads the project's recipes, not these."""
    jobs = OmegaConf.load(path).jobs
    changed = ("corpus", "merge", "evaluate_merged", "generate", "chats", "answers_sft", "answers_cap")
    corpus, merge, measure, generate, chats, *answers = (
        list(OmegaConf.to_container(jobs[name].arguments, resolve=False)) for name in changed
    )
    corpus[corpus.index("--vocab_size") + 1] = str(VOCAB_SIZE)
    corpus += ["--max_bytes", "600000", "--validation_fraction", "0.2"]
    merge[merge.index("--k") + 1] = "2"
    measure += [f"evaluation.num_tokens={VALIDATION_TOKENS}"]
    generate[generate.index("max_new_tokens=64")] = "max_new_tokens=40"
    chats[chats.index("--num_train") + 1], chats[chats.index("--num_held_out") + 1] = "20", "2"
    short = [[*words, "--thresholds", "0.5", "0.9", "--max_new_tokens", "8"] for words in answers]
    arguments = zip(changed, (corpus, merge, measure, generate, chats, *short), strict=True)
    _change(path, {f"jobs.{name}.arguments": words for name, words in arguments})


def run_chain_here(recipes: Path, root: Path) -> Path:
    """Run every job of the chain; the folder that it has filled."""
    chain = compose_chain(["experiment=tiny_demo", f"root={root}"], recipes)
    for job in chain.jobs:
        freeze_job(chain, job)
        world_size = job.spec.nodes * job.ranks_per_node(chain.config.cluster) if job.is_parallel else 1
        codes = run_ranks(run_module, world_size, rank_arguments(chain, job), timeout_s=500.0)
        assert codes == [0] * world_size, f"job {job.name} ended with {codes}"
    return chain.folder


def run_module(arguments: list[str]) -> int:
    """Do what `python ARGUMENTS` does, ARGUMENTS being -m MODULE and its words; the exit code."""
    assert arguments[0] == "-m"
    os.chdir(ROOT)
    sys.argv = arguments[1:]
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
