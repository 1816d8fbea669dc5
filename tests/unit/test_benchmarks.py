"""What the benchmarks count: pairs that backends compute, and the causal sequence they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import context_balance, context_exchange, engine_answer, long_attention, real_rank
from benchmarks.attention import causal_run
from benchmarks.computed_pairs import build_roles, computed_pairs
from benchmarks.decoding import Way, draw_prompts, measure
from benchmarks.likelihood import errors, passes_for, runs_of
from benchmarks.pair_rows import measure_file, measure_rows
from benchmarks.sft import draw_chats, packed_and_padded, packed_geometry
from benchmarks.step import joined
from megatron_dllm.config import ParallelConfig
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention import chunked, flex, shared_prefix
from tests import planning_case


@pytest.mark.parametrize("views", [1, 2])
def test_computed_pairs_are_those_of_tiles_that_show_one(views: int) -> None:
    roles = build_roles([150, 3, 40], 32, views)
    mask = visible(roles, roles)[0]
    size = flex.TILE_SIZE
    padded = torch.zeros(-(-len(mask) // size) * size, -(-len(mask) // size) * size, dtype=torch.bool)
    padded[: len(mask), : len(mask)] = mask
    padded[len(mask) :, len(mask) - 1] = True  # a query beyond the row sees one key, the last
    tiles = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)
    got = computed_pairs(flex.build_plan(roles, roles))
    assert got == int(tiles.sum()) * size**2
    for backend in (shared_prefix, chunked):
        assert int(mask.sum()) <= computed_pairs(backend.build_plan(roles, roles)) < got


@pytest.mark.parametrize("pairs", [1, 500, 2016])
def test_causal_sequence_has_as_many_pairs(pairs: int) -> None:
    inputs = tuple(torch.randn(1, heads, 70, 4, requires_grad=True) for heads in (4, 2, 2))
    run = causal_run(pairs, inputs, torch.randn(1, 4, 70, 4))
    length = run.inputs[0].shape[2]
    assert abs(length * (length + 1) / 2 - pairs) <= length / 2 + 1
    run.step()


def test_a_table_that_several_commands_filled_names_them_all() -> None:
    old = {"commit": "a", "command": "first", "repeats": 2}
    both = joined(old, {"commit": "b", "command": "second --extend", "repeats": 2})
    assert both == {"commit": "a; b", "command": "first; second --extend", "repeats": 2}
    assert joined(both, {"commit": "b", "command": "first", "repeats": 1}) == both | {"repeats": "2; 1"}


def test_packed_and_padded_chats_train_the_same_targets() -> None:
    source = draw_chats(40, context_length=256, median=20.0, sigma=0.8)
    packed, padded = packed_and_padded(source, packed_geometry(256, 1024), 2)

    def targets(batches: list) -> list[tuple[int, ...]]:
        found = []
        for batch in batches:
            positions = batch.target_positions
            columns = (
                batch.sample_ids[batch.target_segments],
                batch.target_views,
                batch.position_ids[0, positions],
                batch.target_ids,
            )
            found += list(zip(*(column.tolist() for column in columns), strict=True))
        return sorted(found)

    assert targets(packed) == targets(padded) and len(padded) > len(packed) == 2
    tokens, expected_more = (sum(batch.input_ids.numel() for batch in batches) for batches in (packed, padded))
    assert tokens < expected_more


def test_ways_of_decoding_are_compared_on_the_same_prompts() -> None:
    def repeat(prompts: Sequence[list[int]]) -> tuple[list[list[int]], float]:
        return [ids[:4] for ids in prompts], 0.5

    def repeat_but_one(prompts: Sequence[list[int]]) -> tuple[list[list[int]], None]:
        return [[*ids[:3], 0] for ids in prompts], None

    ways = [Way("base", 2, repeat), Way("other", 5, repeat_but_one)]
    base, other = measure(ways, 40, vocab_size=20)
    assert (base["ratio"], base["same"], base["model"], other["model"]) == (1.0, 1.0, 0.5, None)
    assert other["same"] == 0.75 and other["ratio"] == other["tokens_per_s"] / base["tokens_per_s"]
    lengths = [len(ids) for ids in draw_prompts(40, 50, 20)]
    assert min(lengths) >= 24 and max(lengths) < 56 and draw_prompts(40, 3, 20) == draw_prompts(40, 3, 20)


def test_rows_of_pairs_are_measured(tmp_path: Path) -> None:
    row = measure_rows(60, num_views=2, chunk=64)
    assert 0.0 < row["fill"] <= row["apart"] < 1.0 and row["forward_tokens_per_pair"] > 600
    file = measure_file(tmp_path, 1000, 8)
    assert file["megabytes"] == pytest.approx(2 * 1000 * 8 * 4 / 1e6, abs=0.06)


def test_errors_of_estimated_choices_by_hand() -> None:
    exact = np.array([[-1.0, -2.0, -5.0], [-4.0, -3.0, -9.0]])
    # The first run is right; in the second, the first question goes wrong by 2 nats.
    found = errors(np.stack([exact, exact + np.array([[-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])]), exact)
    assert found["error of a choice"] == pytest.approx((4 / 12) ** 0.5)
    assert found["error of the gap"] == pytest.approx((4 / 4) ** 0.5)
    assert found["accuracy"] == 0.25 and found["decided otherwise"] == 0.25
    assert found["spread of accuracy"] == pytest.approx(0.5 / 2**0.5)


def test_runs_are_cut_without_using_a_view_twice() -> None:
    by_view = np.arange(2 * 1 * 3 * 4, dtype=float).reshape(2, 1, 3, 4)
    runs = runs_of(by_view, 2)
    assert (
        runs.shape == (4, 1, 3) and runs[0, 0].tolist() == [0.5, 4.5, 8.5] and runs[3, 0].tolist() == [14.5, 18.5, 22.5]
    )


def test_passes_for_an_error_are_the_fewest_that_reach_it() -> None:
    rows = [{"estimator": "s", "views": views, "error of the gap": error} for views, error in ((1, 4.0), (4, 1.0))]
    assert [passes_for(rows, "s", error) for error in (4.0, 2.0, 0.5)] == [1, 4, None]


def test_a_real_rank_that_is_alone_holds_what_was_predicted() -> None:
    layout = ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2, precision="bf16")
    config = replace(planning_case.config(), parallel=replace(layout, moe_token_dispatcher="alltoall"))
    predicted, measured = (real_rank.run(config, 4, 3, "block", is_real) for is_real in (False, True))
    assert predicted["parameters_e9"] == measured["parameters_e9"] and predicted["weights"] == measured["weights"]
    # The router is as even as chance makes it.
    assert measured["peak"] == pytest.approx(predicted["peak"], rel=0.1)


def test_what_the_engine_cannot_be_asked_is_refused_before_anything_is_built() -> None:
    words = ["experiment=llada2_flash", "data.train=x", "checkpoint.load=x", "--world_size"]
    with pytest.raises(ValueError, match=r"stage \(nosuch\) must be one of warmup_1, "):
        engine_answer.main([*words, "64", "--stages", "nosuch"])
    with pytest.raises(ValueError, match=r"must divide the number of ranks \(3\)"):
        engine_answer.main([*words, "3", "--stages", "stable"])
    with pytest.raises(ValueError, match=r"stage \(nosuch\) must be one of warmup_1, "):
        real_rank.main([*words, "64", "--rank", "0", "--stage", "nosuch"])


@pytest.mark.parametrize(("block_size", "is_general"), [(32, False), (1024, True)])
def test_clean_keys_alone_travel_where_blocks_are_whole(block_size: int, is_general: bool) -> None:
    """One document of 1024 tokens on 8 ranks, counted by hand: 256 tokens a rank, half of them clean, steps of 32."""
    rows = context_balance.build_rows(context_exchange.geometry_of(1024, block_size), 1, 1024, 0.0)
    found = context_exchange.measure(rows, 8, num_groups=4, kv_channels=128)
    assert found["all_mib"] == pytest.approx(7 * 256 * 2 * 4 * 128 * 2 / 2**20)
    assert found["general"] == float(is_general)
    assert (found["share"] == 1.0) if is_general else (0.5 <= found["share"] <= 0.75)
    assert found["balance"] <= 1.02


def test_a_context_rank_of_long_rows_sees_its_pairs() -> None:
    args = SimpleNamespace(block=32, ranks=4, head_dim=8, backend="shared_prefix", document=128)
    for kind, num_documents in (("one", 1), ("equal", 4)):
        found = long_attention.measure_row(512, kind, args)
        assert found["million_pairs"] == pytest.approx(512**2 / num_documents / 4 / 1e6, rel=0.1)
        assert found["peak_mib"] > 0 and found["ns_a_pair"] > 0
