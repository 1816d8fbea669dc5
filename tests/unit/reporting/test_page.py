"""The page shows what there is, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dllm.reporting.history import read_history
from megatron_dllm.reporting.page import fold_blank_lines, format_seconds, page, tokens_per_forward
from megatron_dllm.reporting.results import results
from tests.unit.reporting.folders import COMMIT, training_record, write_chain, write_run


def page_of(folder: Path) -> str:
    history = read_history(folder)
    return page(history, results(history))


def test_a_chain_says_what_when_where_and_by_which_code(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    texts = [{"prompt": "def f(\u2028", "text": "<b>\n\n\n\nx"}]
    (chain / "samples.jsonl").write_text(json.dumps(texts[0], ensure_ascii=False) + "\n")
    text = page_of(chain)
    assert text.count(COMMIT) == 1  # what all runs share stands there once
    for part in (
        "<h1>full</h1>",
        "bailing_moe, 4 layers; block sizes 4, 8, 16.",
        "2023-11-14 22:13 UTC",
        "torchrun --nnodes 2 --nproc_per_node 8 -m megatron_dllm.train experiment=x",
        "node7",
        "<h2>warmup → stable → decay</h2>",
        "<td>after decay</td><td>ELBO, block 32</td><td>3.0000</td><td>1.5000</td>",
        "&lt;b&gt;",
        "⋯ 3 blank lines ⋯",
        "<td>together</td><td>0:03:03</td>",
    ):
        assert part in text
    assert text.count("<img") == 6  # validation, loss, schedule, noise levels, speed, router
    assert "No row of the run is drawn" in text


def test_what_changed_on_the_way_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [training_record(4)])
    assert "Changed on the way" not in page_of(run)
    change = {"optimizer.clip_grad": [1.0, "<0.5>"], "odd": 3}
    lines = [{"time": "2026-01-01T00:00:00+00:00", "step": 0, "changes": {}}, {"step": 4, "changes": change}, {}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "starts.jsonl").write_text(text + '{"step": 5, "chan', encoding="utf-8")
    shown = page_of(run)
    assert "at step 4: optimizer.clip_grad: 1.0 → &lt;0.5&gt;" in shown and "odd" not in shown
    many = {f"key_{number}": [0, 1] for number in range(20)}
    (run / "starts.jsonl").write_text(json.dumps({"step": 4, "changes": many}) + "\n")
    assert "key_11" in page_of(run) and "key_12" not in page_of(run) and "and 8 more (starts.jsonl)" in page_of(run)


def test_a_run_that_was_not_validated_leaves_the_results_as_they_were(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    before = results(read_history(chain))
    write_run(chain / "sft", [training_record(4, stage="sft", block_size=16)], load="full/merged", time=1.75e9)
    history = read_history(chain)
    assert [track.name for track in history.tracks] == ["warmup → stable → decay", "sft"]
    assert results(history) == before and len(before) > 1
    assert "block sizes 4, 8, 16." in page(history, before)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "validation": True, "is_stage_end": True}],
        [{}],
        [training_record(4, router_load=[[0.0, 0.0]] * 3)],
        [training_record(4, grad_norm=float("inf"), loss=float("nan"))],
        [training_record(4), training_record(8, grad_norm=1e9)],
    ],
    ids=["empty", "one_step", "no_number_validated", "no_number", "no_router_load", "not_finite", "a_spike"],
)
def test_a_run_with_little_to_show_still_has_a_page(tmp_path: Path, records: list[dict[str, object]]) -> None:
    run = write_run(tmp_path / "run", records)
    for name in ("git.txt", "config.yaml", "lease/generation_000001"):
        (run / name).unlink()
    text = page_of(run)
    assert "Nothing was validated: set evaluation.num_tokens and data.validation" in text
    assert text.count("not recorded") >= 3
    assert ("No step has been logged yet." in text) == (not records)


def test_a_strangers_configuration_is_shown_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "do not tell")
    run = write_run(tmp_path / "run", [training_record(4)])
    (run / "config.yaml").write_text("data: {train: '${oc.env:SECRET}<script>'}\nmodel: {family: '${oc.env:SECRET}'}\n")
    text = page_of(run)
    assert "do not tell" not in text
    assert "${oc.env:SECRET}&lt;script&gt;" in text
    assert "its config.yaml holds &#x27;${&#x27;, which is not resolved here" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\nb\n", "a\n\nb\n"),
        ("a\n\n\nb", 'a\n<span class="fold">⋯ 2 blank lines ⋯</span>\nb'),
        ("a\n \t\n\n  \n  b", 'a\n<span class="fold">⋯ 3 blank lines ⋯</span>\n  b'),
        ("\n" * 128, '\n<span class="fold">⋯ 127 blank lines ⋯</span>\n'),
        ("<a>\n\n\n&", '&lt;a&gt;\n<span class="fold">⋯ 2 blank lines ⋯</span>\n&amp;'),
    ],
)
def test_blank_lines_are_folded(text: str, expected: str) -> None:
    assert fold_blank_lines(text) == expected


def test_small_things() -> None:
    assert [format_seconds(value) for value in (0.4, 59.6, 3661, 90000)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "25:00:00",
    ]
    samples = [{"num_generated_tokens": 6, "num_denoising_forwards": 4}] * 2
    assert tokens_per_forward(samples) == 1.5
    assert tokens_per_forward([]) is tokens_per_forward([{"text": "x"}]) is None
