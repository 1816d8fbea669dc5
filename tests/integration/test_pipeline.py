"""What the demo's chain leaves behind, from text to decoded samples and a report; its launcher makes the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.demo import main as record_demo
from tests.integration.tiny_chain import ROOT


def test_every_stage_of_the_schedule_was_trained_and_measured(demo: Path) -> None:
    records = [json.loads(line) for line in (demo / "convert" / "metrics.jsonl").read_text().splitlines()]
    ends = [r["stage"] for r in records if r.get("validation") and r["is_stage_end"]]
    assert ends == ["warmup_1", "warmup_1", "warmup_4", "warmup_32", "warmup_64", "stable", "decay_128", "decay_32"]
    assert all(
        {"validation_elbo/32", "validation_elbo/512", "validation_bits_per_byte/32"} <= r.keys()
        for r in records
        if r.get("validation") and r["is_stage_end"]
    )
    logged = [r for r in records if "loss" in r]
    assert {
        "learning_rate",
        "grad_norm",
        "mask_embedding_norm",
        "tokens_per_second",
        "forward_tokens_per_second",
        "peak_memory_gib",
        "router_imbalance/masked",
    } <= logged[-1].keys()


def test_the_exported_folder_is_complete(demo: Path) -> None:
    names = set()
    for shard in (demo / "hf").glob("*.safetensors"):
        with safe_open(str(shard), "pt") as file:
            names |= set(file.keys())
    assert "model.layers.1.mlp.experts.15.down_proj.weight" in names and "lm_head.weight" in names
    config = json.loads((demo / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LLaDA2MoeModelLM"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= {
        f.name for f in (demo / "hf").iterdir()
    }


def test_the_card_tells_the_weights_history(demo: Path) -> None:
    card = (demo / "hf" / "README.md").read_text().splitlines()
    steps = json.loads((demo / "merged" / "provenance.json").read_text())["inputs"][-1]["step"]
    rows = dict(line.strip("| ").split(" | ", 1) for line in card if line.startswith("| ") and line != "| | |")
    assert "# merged" in card
    taken = "Optimizer steps of the run (of the newest that went into the merge)"
    assert {name: rows[name] for name in ("Converted from", "Recipe", "Checkpoint", taken)} == {
        "Converted from": "base_hf",
        "Recipe": "convert/config.yaml",
        "Checkpoint": "merged",
        taken: str(steps),
    }
    assert str(demo) not in "".join(card)
    validation = json.loads((demo / "merged" / "validation.json").read_text())
    assert rows["32"] == f"{validation['elbo']['32']:.4f} | {validation['bits_per_byte']['32']:.4f}"
    merged = [name for name in rows if name.startswith("convert/step_")]
    assert len(merged) == 2 and all(rows[name].startswith("0.5000 | ") for name in merged)


def test_samples_merge_and_report_are_there(demo: Path) -> None:
    samples = [json.loads(line) for line in (demo / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and all(s["num_denoising_forwards"] > 0 for s in samples)
    merged = json.loads((demo / "merged" / "validation.json").read_text())
    assert 0 < merged["elbo"]["32"] < 10
    page = (demo / "report.html").read_text()
    # Loss, learning rate, speed, router and mask of the base; of the conversion also validation and noise levels; the
    # same of SFT and CAP without validation; answers.
    assert page.count("data:image/png;base64,") == 5 + 7 + 1 + 6 and "http" not in page
    assert "<td>merged</td>" in page and "tokens per forward" in page and "No row of the run is drawn" not in page


def _launch(recipes: Path, root: Path) -> str:
    command = [sys.executable, "launch/local.py", "experiment=tiny_demo", f"root={root}", "--config-dir", str(recipes)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


# Jobs of the chain that the launcher starts in the test: the way from text to text, each kind of job once or twice.
LAUNCHED = (
    *("corpus", "tokenize_train", "tokenize_validation", "base", "base_to_hf", "hf_to_mcore", "convert"),
    *("merge", "export", "generate", "report"),
)


def _shorter(recipes: Path, folder: Path) -> Path:
    """The recipes, with a chain of these jobs alone."""
    shutil.copytree(recipes, folder)
    path = folder / "chain" / "tiny_demo.yaml"
    chain = OmegaConf.load(path)
    chain.jobs = {name: chain.jobs[name] for name in LAUNCHED}
    path.write_text("# @package _global_\n" + OmegaConf.to_yaml(chain))
    return folder


@pytest.mark.slow
def test_the_launcher_makes_the_same_and_a_second_start_finds_everything_finished(
    small_chain: Path, demo: Path, tmp_path: Path
) -> None:
    """Programs started one by one, as `make demo` does, come to the weights of the functions called in ranks."""
    recipes = _shorter(small_chain / "recipes", tmp_path / "recipes")
    output = _launch(recipes, tmp_path)
    assert "finished before, skipped" not in output
    made = tmp_path / "demo"
    for folder in ("base_hf", "hf"):
        tensors, expected = (
            {
                name: value
                for path in sorted((root / folder).glob("*.safetensors"))
                for name, value in load_file(path).items()
            }
            for root in (made, demo)
        )
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].equal(value) for name, value in expected.items()), folder
    assert _texts(made) == _texts(demo)
    assert (made / "report.html").is_file()
    before = (made / "hf" / "config.json").stat().st_mtime_ns
    assert _launch(recipes, tmp_path).count("finished before, skipped") == len(LAUNCHED)
    assert (made / "hf" / "config.json").stat().st_mtime_ns == before


def _texts(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_tables_and_pictures_of_the_readme_are_recorded(demo: Path, tmp_path: Path) -> None:
    assert record_demo(["--demo", str(demo), "--results", str(tmp_path), "--images", str(tmp_path)]) == 0
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["demo_answers.png", "demo_elbo.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    tables = json.loads((tmp_path / "demo.json").read_text())
    models = {row["model"]: row["measure"] for row in tables["models"]}
    assert models["AR base"] == "exact NLL" and models["merged"] == "ELBO, block 32"
    assert [(row["model"], row["threshold"]) for row in tables["answers"]] == [
        (name, threshold) for name in ("sft", "cap") for threshold in ("0.5", "0.9")
    ]
    text = (tmp_path / "demo.md").read_text()
    assert "## models" in text and "## answers" in text and str(tables["about"]["commit"]) in text
    with pytest.raises(ValueError, match=r"demo \(.*base\) has no answers to record; finish it with make demo"):
        record_demo(["--demo", str(demo / "base"), "--results", str(tmp_path)])
