"""Choosing, averaging, and refusing what has no mean."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import mcore_to_hf
from checkpoints_tools.merge_topk import choose, main, merge
from megatron_dllm.checkpoint.manifest import is_complete, read_json, write_manifest
from megatron_dllm.checkpoint.merging import stream as merge_stream
from megatron_dllm.checkpoint.meta import read_meta, write_meta
from megatron_dllm.checkpoint.stored_model import open_checkpoint, read_stored_model
from megatron_dllm.checkpoint.torch_dist_write import TorchDistWriter
from megatron_dllm.checkpoint.validation import read_validation, write_validation
from megatron_dllm.hf.name_table import key_aliases
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import VALIDATION
from tests.tiny_models import LING, left_in, seal
from tests.unit.checkpoint.small_checkpoint import CONDITIONS


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    _, reader = open_checkpoint(folder)
    result = {}
    for key, tensor in reader.metadata.tensors.items():
        result[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        reader.read(key, (0,) * len(tensor.shape), tensor.shape, result[key].view(-1))
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mean_of_three(make_checkpoint, tmp_path: Path, dtype: torch.dtype) -> None:
    inputs = [make_checkpoint(f"c{seed}", seed, dtype) for seed in range(3)]
    merge(inputs, tmp_path / "merged")
    parts = [_tensors(folder) for folder in inputs]
    for key, value in _tensors(tmp_path / "merged").items():
        # Three bf16 numbers of similar size: their fp64 mean is never halfway, so torch's rounding is right too.
        expected = (sum(part[key].double() for part in parts) / 3).to(value.dtype)
        assert value.dtype == parts[0][key].dtype
        assert torch.equal(value, expected), key
    provenance = read_json(tmp_path / "merged" / "provenance.json")
    assert [entry["checkpoint"] for entry in provenance["inputs"]] == [str(folder) for folder in inputs]
    assert is_complete(tmp_path / "merged")
    assert read_meta(tmp_path / "merged").semantics == read_meta(inputs[0]).semantics


@pytest.mark.parametrize("weights", ["uniform", "cosine"])
def test_mean_of_equal_checkpoints_is_the_checkpoint(make_checkpoint, tmp_path: Path, weights: str) -> None:
    folder = make_checkpoint("a", 1)
    merge([folder] * 5, tmp_path / "merged", weights)
    expected = _tensors(folder)
    actual = _tensors(tmp_path / "merged")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key].view(torch.uint8), value.view(torch.uint8)) for key, value in expected.items())


def test_hf_folders_merge_to_the_same(make_checkpoint, tmp_path: Path) -> None:
    inputs = [make_checkpoint(f"c{seed}", seed) for seed in range(3)]
    merge(inputs, tmp_path / "merged", "1-sqrt")
    mcore_to_hf.convert(tmp_path / "merged", tmp_path / "expected")
    merge([tmp_path / f"c{seed}_hf" for seed in range(3)], tmp_path / "actual", "1-sqrt", "hf")
    actual, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("actual", "expected"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    assert (tmp_path / "actual" / "config.json").read_text() == (tmp_path / "c2_hf" / "config.json").read_text()
    assert "c1" in (tmp_path / "expected" / "README.md").read_text()


def test_an_hf_merge_takes_the_model_and_not_its_history(make_checkpoint, tmp_path: Path) -> None:
    make_checkpoint("a", 0), make_checkpoint("b", 1)
    a, b = tmp_path / "a_hf", tmp_path / "b_hf"
    (b / "README.md").write_text("ELBO 1.5")
    for name in ("tokenizer.json", "modeling_x.py", "LICENSE", "pytorch_model.bin", "optimizer.pt", "notes.txt"):
        for folder in (a, b):
            (folder / name).write_text("{}")
    merge([a, b], tmp_path / "out")
    assert left_in(tmp_path / "out") == {
        "config.json",
        "tokenizer.json",
        "modeling_x.py",
        "LICENSE",
        "README.md",
        "provenance.json",
        "model.safetensors",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        card.startswith("# out\n")
        and f"| {a.name} | 0.5000 |  |" in card
        and str(tmp_path) not in card
        and "1.5" not in card
    )


def test_only_what_tells_models_apart_must_be_equal(make_checkpoint, tmp_path: Path) -> None:
    inputs = [make_checkpoint("a", 0), make_checkpoint("b", 1)]
    _change_contract(inputs[1], "model", "init_method_std", 0.5)
    merge(inputs, tmp_path / "out")
    assert read_stored_model(tmp_path / "out").model.init_method_std == 0.5


def test_the_card_of_a_merge_names_its_run(make_checkpoint, tmp_path: Path) -> None:
    run = _run(tmp_path, make_checkpoint, [3.0, 2.0, 4.0])
    (run / "config.yaml").write_text("")
    checkpoints, choice = choose(run, 2)
    merge(checkpoints, tmp_path / "best", choice=choice)
    provenance = read_json(tmp_path / "best" / "provenance.json")
    assert [entry["elbo"] for entry in provenance["inputs"]] == [3.0, 2.0]
    assert len(provenance["commit"].removesuffix("-dirty")) == 40
    assert {name: provenance["choice"][name] for name in ("metric", "block_size", "last_n")} == {
        "metric": "elbo",
        "block_size": 32,
        "last_n": None,
    }
    assert [(entry["checkpoint"], entry["elbo"]) for entry in provenance["choice"]["ranking"]] == [
        ("step_0000001", 2.0),
        ("step_0000000", 3.0),
        ("step_0000002", 4.0),
    ]
    titles = {}
    for name, folder in (("merge", tmp_path / "best"), ("run", run), ("converted", tmp_path / "c0")):
        mcore_to_hf.convert(folder, tmp_path / f"{name}_out")
        card = (tmp_path / f"{name}_out" / "README.md").read_text()
        titles[name] = next(line for line in card.splitlines() if line.startswith("# "))
        assert ("| Recipe | run/config.yaml |" in card) == (name != "converted")
        assert "| Converted from | c" in card and str(tmp_path) not in card
    assert titles == {"merge": "# best", "run": "# run", "converted": "# c0"}


def _run(tmp_path: Path, make_checkpoint, elbos: list[float | None]) -> Path:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step, elbo in enumerate(elbos):
        folder = make_checkpoint(f"c{step}", step)
        shutil.copytree(folder, checkpoints / f"step_{step:07d}")
        if elbo is not None:
            write_json(
                checkpoints / f"step_{step:07d}" / VALIDATION,
                {
                    "elbo": {"32": elbo, "4": -elbo},
                    "bits_per_byte": {"32": elbo / 2},
                    "target_block_size": 32,
                    "num_tokens": 1,
                },
            )
    return tmp_path / "run"


def test_chooses_the_best_and_keeps_their_order(make_checkpoint, tmp_path: Path) -> None:
    run = _run(tmp_path, make_checkpoint, [3.0, 2.0, 4.0, None, 2.5])

    def steps(*args: object, **kwargs: object) -> list[int]:
        return [int(folder.name.removeprefix("step_")) for folder in choose(run, *args, **kwargs)[0]]

    assert steps(2) == [1, 4]
    assert steps(3) == [0, 1, 4]
    assert steps(2, block_size=4) == [0, 2]
    assert steps(3, metric="bits_per_byte") == [0, 1, 4]
    assert steps(1, last_n=3) == [4]
    assert steps(3, last_n=3) == [2, 3, 4]
    with pytest.raises(ValueError, match=r"k \(5\) must not exceed .*\(4 of 5\)"):
        choose(run, 5)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        choose(tmp_path, 2)


def test_what_is_not_finite_is_not_the_best(make_checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = _run(tmp_path, make_checkpoint, [3.0, float("nan"), 2.0, float("-inf")])
    assert [folder.name for folder in choose(run, 2)[0]] == ["step_0000000", "step_0000002"]
    assert "step_0000001 stays out: its elbo is nan" in caplog.text
    with pytest.raises(ValueError, match=r"k \(3\) must not exceed .*\(2 of 4\)"):
        choose(run, 3)


def test_only_what_was_measured_alike_is_compared(
    make_checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _run(tmp_path, make_checkpoint, [2.5, 1.0, 3.0])
    for step, num_tokens in ((0, 100), (1, 20), (2, 100)):
        folder = run / "checkpoints" / f"step_{step:07d}"
        found = read_validation(folder)
        assert found is not None
        write_validation(folder, replace(found, conditions=replace(CONDITIONS, num_tokens=num_tokens)))
    chosen, choice = choose(run, 2)
    assert [folder.name for folder in chosen] == ["step_0000000", "step_0000002"]
    assert choice["conditions"]["num_tokens"] == 100
    assert "step_0000001 stays out: it was measured unlike step_0000002: num_tokens 20, not 100" in caplog.text
    with pytest.raises(ValueError, match=r"k \(3\) .*\(2 of 3\); step_0000001 stays out: .*num_tokens 20, not 100"):
        choose(run, 3)


@pytest.mark.parametrize("arguments", [("--k", "0"), ("--k", "-1"), ("--last_n", "-2"), ("--block_size", "x")])
def test_numbers_must_be_positive(
    arguments: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["merge_topk", "--run", str(tmp_path), "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{arguments[0]}: ({arguments[1]}) must be a whole number of at least 1" in capsys.readouterr().err


def test_other_stages_stay_out(make_checkpoint, tmp_path: Path) -> None:
    run = _run(tmp_path, make_checkpoint, [1.0, 2.0, 3.0])
    path = run / "checkpoints" / "step_0000000" / "contract.json"
    content = json.loads(path.read_text())
    content["contract"]["block_size"] = 99
    text = json.dumps(content)
    path.write_text(text + " " * (path.stat().st_size - len(text)))
    assert [folder.name for folder in choose(run, 2)[0]] == ["step_0000001", "step_0000002"]


def _change_contract(folder: Path, part: str, name: str, value: object) -> None:
    content = json.loads((folder / "contract.json").read_text())
    content[part][name] = value
    (folder / "contract.json").write_text(json.dumps(content))
    seal(folder)


def test_what_has_no_mean_is_refused_by_name(make_checkpoint, tmp_path: Path) -> None:
    first = make_checkpoint("a", 0)
    cases = {
        "blocks": (lambda: make_checkpoint("blocks", 1), r"contract\.block_size is 1 in .*a and 4"),
        "wide": (lambda: make_checkpoint("wide", 1, torch.float32), r"tensor .* is bfloat16 .* and float32"),
        "larger": (
            lambda: make_checkpoint("larger", 1, model=replace(LING, ffn_hidden_size=28)),
            r"model\.ffn_hidden_size is 20",
        ),
    }
    for name, (make, message) in cases.items():
        other = make()
        if name == "blocks":
            _change_contract(other, "contract", "block_size", 4)
        with pytest.raises(ValueError, match=message):
            merge([first, other], tmp_path / "out")
    with pytest.raises(ValueError, match="at least 2"):
        merge([first], tmp_path / "out")
    with pytest.raises(ValueError, match="another format"):
        merge([first, tmp_path / "a_hf"], tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder"):
        merge([first, tmp_path / "nowhere"], tmp_path / "out")
    assert "out" not in left_in(tmp_path)


def test_hf_folders_with_other_names(make_checkpoint, tmp_path: Path) -> None:
    make_checkpoint("a", 0), make_checkpoint("b", 1)
    a, b = tmp_path / "a_hf", tmp_path / "b_hf"
    tensors = load_file(b / "model.safetensors")
    save_file(
        {("other" if name == "lm_head.weight" else name): value for name, value in tensors.items()},
        b / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight is in .*a_hf but not in .*b_hf"):
        merge([a, b], tmp_path / "out")
    save_file(tensors, b / "model.safetensors")
    assert "out" not in left_in(tmp_path)


def test_nan_names_the_checkpoint_and_leaves_nothing(make_checkpoint, tmp_path: Path) -> None:
    make_checkpoint("a", 0), make_checkpoint("b", 1)
    tensors = load_file(tmp_path / "b_hf" / "model.safetensors")
    tensors["model.norm.weight"][2] = float("inf")
    save_file(tensors, tmp_path / "b_hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"b_hf: model\.norm\.weight holds 1 NaN or Inf"):
        merge([tmp_path / "a_hf", tmp_path / "b_hf"], tmp_path / "out")
    assert left_in(tmp_path) == {"a", "a_hf", "b", "b_hf"}


def test_interrupted_merge_leaves_nothing(make_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [make_checkpoint("a", 0), make_checkpoint("b", 1)]

    def interrupt(*_: object) -> None:
        assert any(name.startswith(".out.incomplete") for name in left_in(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_stream, "_write_box", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(inputs, tmp_path / "out")
    assert left_in(tmp_path) == {"a", "a_hf", "b", "b_hf"}


@pytest.mark.parametrize("has_local_names", [True, False])
@pytest.mark.parametrize("is_last", [True, False])
def test_checkpoints_with_one_set_of_names(
    make_checkpoint, tmp_path: Path, has_local_names: bool, is_last: bool
) -> None:
    """A converter names the norms before experts twice; a run once, a model of megatron-core's own specs either way."""
    sources = [make_checkpoint("a", 0), make_checkpoint("b", 1)]
    inputs = [sources[0], _as_a_run_saves_it(sources[1], tmp_path / "run", has_local_names)]
    merge(inputs if is_last else inputs[::-1], tmp_path / "merged")
    merge(sources, tmp_path / "expected")
    actual, expected = _tensors(tmp_path / "merged"), _tensors(tmp_path / "expected")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    mcore_to_hf.convert(inputs[1], tmp_path / "hf")
    exported, original = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "b_hf"))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], value) for key, value in original.items())


def test_optimizer_state_stays_out(make_checkpoint, tmp_path: Path) -> None:
    inputs = [_as_a_run_saves_it(make_checkpoint(f"c{seed}", seed), tmp_path / f"run{seed}") for seed in range(2)]
    assert "optimizer.exp_avg" in _tensors(inputs[0])
    merge(inputs, tmp_path / "merged")
    assert "optimizer.exp_avg" not in _tensors(tmp_path / "merged")
    mcore_to_hf.convert(inputs[0], tmp_path / "hf")
    exported, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "c0_hf"))
    assert exported.keys() == expected.keys()


def _as_a_run_saves_it(source: Path, target: Path, has_local_names: bool = True) -> Path:
    """The same weights beside optimizer state, with one set of names, in chunks split along columns."""
    target.mkdir()
    writer = TorchDistWriter(target)
    aliases = key_aliases(LING)
    second = set(aliases.values() if has_local_names else aliases)
    for key, value in {**_tensors(source), "optimizer.exp_avg": torch.randn(5)}.items():
        if key in second:
            continue
        writer.add(key, value.dtype, tuple(value.shape))
        half = value.shape[-1] // 2
        writer.write(key, (0,) * value.dim(), value[..., :half].clone())
        writer.write(key, (*(0,) * (value.dim() - 1), half), value[..., half:].clone())
    checksums = writer.close()
    write_meta(target, read_meta(source))
    write_manifest(target, checksums)
    return target
