"""What a start decides from a configuration and what lies on disk, without a process group."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_run import STAGES, run_config, write_corpus
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.config import CheckpointConfig, EvaluationConfig, ParallelConfig, ReferenceConfig, TrainConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.data.spans_file import write_spans
from megatron_dllm.run.names import CONFIG
from megatron_dllm.training.blends import corpora_of_stages, stage_shares
from megatron_dllm.training.past import as_yaml
from megatron_dllm.training.sources import Sources
from megatron_dllm.training.start import Start, decide_start
from tests.distributed.test_start import write_checkpoint

TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    write_corpus(tmp_path / "corpus")
    return run_config(tmp_path, "run")


def decide(config: TrainConfig, world_size: int | None = 1) -> Start:
    return decide_start(config, world_size, Sources(config))


def with_stage(config: TrainConfig, name: str, **changes: object) -> TrainConfig:
    stages = {**config.schedule.stages, name: replace(config.schedule.stages[name], **changes)}
    return replace(config, schedule=replace(config.schedule, stages=stages))


def test_a_new_run(config: TrainConfig) -> None:
    start = decide(config)
    assert (start.resume, start.weights, start.passed_over, start.warnings) == (None, None, {}, ())
    assert [stage.name for stage in start.schedule.stages] == list(STAGES)
    assert start.layout == config.parallel
    assert start.num_corpus_tokens == Sources(config).corpora[config.data.train].num_tokens
    assert all(row.steps is not None and row.steps > 3 for row in start.table)


def test_a_reference_that_no_stage_reads_is_said(config: TrainConfig) -> None:
    (text,) = decide(replace(config, preference=ReferenceConfig("frozen"))).warnings
    assert text.startswith("preference.reference (frozen) has no effect, as no stage compares answers")


def test_a_run_continues_with_its_newest_checkpoint_in_the_layout_of_its_stage(config: TrainConfig) -> None:
    config = with_stage(config, "warmup", parallel=TP2)
    write_checkpoint(config, 3)
    start = decide(config, 2)
    assert start.resume is not None and start.resume.folder.name == "step_0000003"
    assert (start.resume.state.step, start.resume.state.consumed_tokens) == (3, 300)
    assert start.layout == TP2
    assert start.weights is None


def test_a_damaged_checkpoint_is_passed_over_with_the_reason(config: TrainConfig) -> None:
    folder = write_checkpoint(config, 3)
    newer = folders.step_folder(folder.parent, 5)
    newer.mkdir()
    start = decide(config)
    assert start.resume is not None and start.resume.folder == folder
    assert list(start.passed_over) == [newer] and "manifest.json is missing" in start.passed_over[newer]
    with pytest.raises(
        ValueError, match=r"all of \['step_0000003', 'step_0000005'\] are damaged \(cut short; .*missing"
    ):
        decide_start(config, 1, Sources(config), {folder: "cut short"})


def test_a_stage_wants_its_number_of_ranks(config: TrainConfig) -> None:
    for name in STAGES:
        config = with_stage(config, name, world_size=2)
    with pytest.raises(ValueError, match=r"stages.warmup.world_size \(2\) differs from the number of ranks \(1\)"):
        decide(config, 1)
    assert decide(config, 2).layout == decide(config, None).layout


def test_a_run_is_not_started_anew_over_its_checkpoints(config: TrainConfig) -> None:
    write_checkpoint(config, 3)
    with pytest.raises(ValueError, match=r"checkpoint.resume \(false\) starts anew, but run.name \(run\)"):
        decide(replace(config, checkpoint=CheckpointConfig(resume=False)))


def test_a_position_in_other_rows_is_refused(config: TrainConfig) -> None:
    write_checkpoint(config, 3)
    with pytest.raises(ValueError, match=r"seed \(5\) differs from the saved data position's \(1234\)"):
        decide(replace(config, run=replace(config.run, seed=5)))


def test_a_stage_that_is_over_stays_as_it_was(config: TrainConfig) -> None:
    folder = write_checkpoint(config, 3)
    now = with_stage(config, "warmup", block_size=8)
    (folder.parents[1] / CONFIG).write_text(as_yaml(config))
    with pytest.raises(ValueError, match=r"warmup: block_size \(8\) differs from the checkpoint"):
        decide(now)
    with pytest.raises(ValueError, match=r"warmup: clean_block_size \(1\) differs from the checkpoint .* \(4\)"):
        decide(with_stage(config, "warmup", clean_block_size=1))
    assert decide(config).changes == ()
    longer = with_stage(config, "warmup", num_tokens=1000)
    assert [str(change) for change in decide(longer).changes] == ["schedule.stages.warmup.num_tokens: 900 -> 1000"]
    with pytest.raises(ValueError, match=r"warmup lies between 0 and 300 tokens, the checkpoint"):
        decide(
            with_stage(config, "warmup", num_tokens=300, global_batch_size=1, micro_batch_size=1, lr_warmup_tokens=0)
        )


def test_settings_without_effect_are_told_with_the_decision(config: TrainConfig) -> None:
    start = decide(with_stage(config, "warmup", final_learning_rate=1e-5))
    assert len(start.warnings) == 1 and "schedule.stages.warmup.final_learning_rate" in start.warnings[0]


def test_each_corpus_is_opened_once(config: TrainConfig) -> None:
    config = replace(
        config,
        data=replace(config.data, validation=config.data.train),
        evaluation=EvaluationConfig(block_sizes=[8, 32], num_tokens=300),
    )
    opened: Counter[str] = Counter()

    def open_counted(prefix: str, config: TrainConfig) -> Corpus:
        opened[prefix] += 1
        return Corpus(prefix, config.model)

    sources = Sources(config, open_counted)
    decide_start(config, 1, sources)
    assert sources.validation is not None and sources.corpora[config.data.train].num_tokens > 0
    assert opened == {config.data.train: 2}, "once to train, once to validate"


# --- the corpora that a run trains on ---------------------------------------------------------------------------


def with_train(config: TrainConfig, train: object, **changes: object) -> TrainConfig:
    return replace(config, data=replace(config.data, train=train, **changes))


@pytest.fixture
def corpora(tmp_path: Path) -> list[str]:
    """Three corpora of the same number of documents."""
    for name, seed in (("one", 0), ("two", 1), ("three", 2)):
        write_corpus(tmp_path / name, seed=seed)
    return [str(tmp_path / name) for name in ("one", "two", "three")]


def test_a_resume_on_other_documents_is_refused(config: TrainConfig, corpora: list[str]) -> None:
    one, two, _ = corpora
    config = with_train(config, one)
    write_checkpoint(config, 3)
    assert decide(config).warnings == ()
    with pytest.raises(ValueError, match=r"data.train differs from .* in stage warmup: .*two \(.*is new.*one \(.*gone"):
        decide(with_train(config, two))
    for suffix in (".bin", ".idx"):
        Path(f"{one}_moved{suffix}").write_bytes(Path(one + suffix).read_bytes())
    assert decide(with_train(config, f"{one}_moved")).warnings == (), "what a corpus holds counts, not where it lies"
    # The same name, other documents.
    for suffix in (".bin", ".idx"):
        Path(one + suffix).write_bytes(Path(two + suffix).read_bytes())
    with pytest.raises(ValueError, match=r"is new, 100.0%; .*is gone, 100.0% .*step_0000003\). Restore"):
        decide(config)


def test_other_weights_are_taken_when_they_are_asked_for(config: TrainConfig, corpora: list[str]) -> None:
    one, two, three = corpora
    config = with_train(config, [0.5, one, 0.5, two])
    write_checkpoint(config, 3)
    assert decide(with_train(config, [3, one, 3, two])).warnings == (), "the same shares"
    moved = with_train(config, [0.6, one, 0.2, two, 0.2, three])
    words = r"one \(fingerprint .{8}\) 60.0% instead of 50.0%; .*two .* 20.0% instead"
    with pytest.raises(ValueError, match=rf"warmup: .*three \(.*\) is new, 20.0%; .*{words}.*data.change_blend=true"):
        decide(moved)
    allowed = replace(moved, data=replace(moved.data, change_blend=True))
    assert [text.split(":")[0] for text in decide(allowed).warnings] == [
        f"data.train differs from the checkpoint's in stage {name}" for name in STAGES
    ]
    # A later stage that names its own corpora was not trained before: it may not change unasked either.
    with pytest.raises(ValueError, match=r"schedule.stages.decay.train differs from the checkpoint's in stage decay"):
        decide(with_stage(config, "decay", train=[1, three]))


def test_stages_with_corpora_of_their_own(config: TrainConfig, corpora: list[str]) -> None:
    one, two, three = corpora
    config = with_stage(with_train(config, [0.5, one, 0.5, two]), "decay", train=three)
    sources = Sources(config)
    assert list(sources.corpora) == corpora
    shares = stage_shares(config, sources)
    assert [list(shares[name].values()) for name in STAGES] == [[0.5, 0.5], [0.5, 0.5], [1.0]]
    assert [record.name for record in corpora_of_stages(config, sources)["decay"]] == ["three"]
    assert all(row.steps is not None and row.steps > 3 for row in decide(config).table)


def test_a_schedule_that_would_repeat_a_corpus(config: TrainConfig, corpora: list[str]) -> None:
    one, two, _ = corpora
    config = with_stage(config, "warmup", num_tokens=20000)
    with pytest.raises(ValueError, match=r"data.on_exhausted \(refuse\) .* reads corpus .*one 2.{3} times"):
        decide(with_train(config, one, on_exhausted="refuse"))
    assert decide(with_train(config, [1, one, 9, two])).warnings == ()
    with pytest.raises(ValueError, match=r"reads corpus .*two 2.{3} times"):
        decide(with_train(config, [1, one, 9, two], on_exhausted="refuse"))


def test_a_damaged_corpus_does_not_start(config: TrainConfig, corpora: list[str]) -> None:
    path = Path(corpora[1] + ".idx")
    content = bytearray(path.read_bytes())
    content[34:36], content[38:40] = content[38:40], content[34:36]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"two.idx: document 1 .* must begin where the document before it ends"):
        decide(with_train(config, [1, corpora[0], 1, corpora[1]]))


def test_a_stage_of_prompts_is_longer_than_a_row_of_them(config: TrainConfig, corpora: list[str]) -> None:
    """Two views of text leave 48 of a row's 96 tokens to documents; a document of which one token is asked fills it."""
    batch = config.schedule.stages["decay"].global_batch_size
    config = with_train(config, corpora[0], packing_chunk=400)
    config = with_stage(config, "decay", num_tokens=batch * config.schedule.tokens_per_row - 1)
    stages = {"decay": config.schedule.stages["decay"]}
    config = replace(config, schedule=replace(config.schedule, stages=stages))
    decide(config)
    sources = Sources(config)  # kept: the lengths are its mapped memory
    lengths = sources.corpora[corpora[0]].document_lengths.tolist()
    write_spans(Path(corpora[0] + ".spans"), Spans.of_lists([[(n - 1, n, MASKABLE)] for n in lengths]))
    with pytest.raises(ValueError, match=r"schedule\.stages\.decay\.num_tokens .* must be at least what one global"):
        decide(config)


def test_segments_without_a_loss_are_told(config: TrainConfig, corpora: list[str]) -> None:
    config = with_train(config, corpora[0], packing_chunk=400)
    sources = Sources(config)  # kept: the lengths are its mapped memory
    lengths = sources.corpora[corpora[0]].document_lengths.tolist()
    write_spans(Path(corpora[0] + ".spans"), Spans.of_lists([[(0, 1, MASKABLE)] for _ in lengths]))
    (told,) = [text for text in decide(config).warnings if "left out" in text]
    dropped = sum(-(-length // config.schedule.context_length) - 1 for length in lengths)
    assert f"one: {dropped / (dropped + len(lengths)):.1%} of its segments hold no token that may carry a loss" in told
