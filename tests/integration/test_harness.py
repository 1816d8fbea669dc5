"""lm-evaluation-harness on task files of the test's own: choices, rolling, chats, examples; one rank and two."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks.ranks import run_ranks
from benchmarks.synthetic import write_synthetic
from megatron_dllm.config import GenerateConfig
from megatron_dllm.evaluation.task_results import read_task_results
from megatron_dllm.generate import generate
from megatron_dllm.harness import compose_words, read_request
from megatron_dllm.hf.tokenizer_folder import chat_template_fingerprint
from tests.conftest import NOT_RUN
from tests.integration.test_generate import CHAT_TEMPLATE, LETTERS, MODEL, VOCAB, save_run, write_tokenizer
from tests.integration.tiny_chain import run_module
from tests.tiny_models import QWEN3

pytest.importorskip("lm_eval", reason=f"{NOT_RUN}no lm-evaluation-harness here; pip install -e '.[eval]'")

TEXTS = ["the cat sat on the mat. " * 3, "once upon a time there was a dog. " * 2, "who are you", "a" * 70]
CHOICES = [
    {"question": "the cat", "choices": ["sat on the mat", "ran", "is a dog"], "label": 0},
    {"question": "once upon a", "choices": ["time", "mat"], "label": 0},
    {"question": "who", "choices": ["are you", "is it", "was there"], "label": 1},
]
ALL = "toy_choice,toy_rolling,toy_writing,toy_greedy"
TASKS: dict[str, dict[str, Any]] = {
    "toy_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["cc", "."], "max_gen_toks": 20},
    },
    "toy_greedy": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "toy_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def run(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = save_run(tmp_path_factory.mktemp("harness") / "run", MODEL)
    (run / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return run


@pytest.fixture(scope="module")
def tasks(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a YAML file of each task, and their questions."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "toy_greedy.jsonl").write_text("\n".join(map(json.dumps, _greedy_questions(run))))
    for name in ("toy_choice", "toy_writing"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    (folder / "toy_rolling.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for name, task in TASKS.items():
        files = {split: str(folder / f"{name}.jsonl") for split in ("train", "test")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        common |= {"fewshot_split": "train", "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


def _greedy_questions(run: Path) -> list[dict[str, Any]]:
    """A prompt with what the model writes behind it, and with something else."""
    config = GenerateConfig(checkpoint=str(run), threshold=1.0, max_new_tokens=4, context_length=64)
    for letter in LETTERS[:26]:
        (result,) = generate(replace(config, prompt=f"the {letter}"))
        if len(result.text.strip()) == 4:  # neither space at an end, which belongs elsewhere, nor special tokens
            other = "zzzz" if result.text != "zzzz" else "aaaa"
            return [{"question": f"the {letter}", "choices": [text]} for text in (result.text, other)]
    raise AssertionError("the model writes no four letters")


def _command(words: list[str], cache: str) -> tuple[int, str]:
    """Exit code and what was printed, in a rank of the test session."""
    import contextlib
    import io

    os.environ.update(HF_HOME=cache, HF_HUB_OFFLINE="1")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run_module(["-m", *words])
    return code, printed.getvalue()


def command(cache: Path, *words: str, num_ranks: int = 1) -> tuple[int, str]:
    (first, *_) = run_ranks(_command, num_ranks, list(words), str(cache), timeout_s=300.0)
    return first


def harness(run: Path, tasks: Path, output: Path, names: str, *words: str, num_ranks: int = 1) -> dict[str, Any]:
    given = [f"checkpoint={run}", f"tasks=[{names}]", f"include_path={tasks}", f"output={output}", *words]
    code, printed = command(tasks / "cache", "megatron_dllm.harness", *given, num_ranks=num_ranks)
    assert code == 0, printed
    assert f"written to {output}" in printed
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def found(run: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("results") / "new" / "harness.json"
    content = harness(run, tasks, output, ALL, "decoding.threshold=0.6")
    read = read_task_results(output)
    assert read.scored_as == "ELBO, block 8" and read.settings["decoding.threshold"] == 0.6
    choice = read.metric("toy_choice", "acc")
    assert choice is not None and choice.value == content["results"]["toy_choice"]["acc,none"]
    return content


def _scores(content: dict[str, Any], task: str) -> list[list[float]]:
    """The scores of every question of a task."""
    samples = sorted(content["samples"][task], key=lambda sample: sample["doc_id"])
    return [[float(value) for (value, _) in sample["filtered_resps"]] for sample in samples]


def test_choices_are_scored_and_counted(found: dict[str, Any]) -> None:
    scores = _scores(found, "toy_choice")
    assert [len(values) for values in scores] == [3, 2, 3] and all(value < 0 for values in scores for value in values)
    right = [values.index(max(values)) == choice["label"] for values, choice in zip(scores, CHOICES, strict=True)]
    assert found["results"]["toy_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    decisions = found["decisions"]["toy_choice"]
    assert decisions["num_questions"] == 3 and decisions["num_unsure"] == len(decisions["unsure"])
    settings = found["settings"]
    assert (settings["block_size"], settings["context_length"], settings["precision"]) == (8, 64, "fp32")
    assert settings["likelihood"]["fill"] == "mask" and settings["likelihood"]["num_views"] == 8
    assert settings["lm_eval"].startswith("0.4.") and settings["chat_template"] is None


def test_rolling_bits_per_byte_are_those_of_evaluate(
    found: dict[str, Any], run: Path, tasks: Path, tmp_path: Path
) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "evaluate.json"
    code, printed = command(
        tasks / "cache",
        *("megatron_dllm.data.tokenize", "--input", str(tasks / "toy_rolling.jsonl"), "--output", str(corpus)),
        *("--tokenizer", str(run / "tokenizer"), "--num_workers", "1"),
    )
    assert code == 0, printed
    words = [f"checkpoint={run}", f"data.validation={corpus}", f"output={output}"]
    code, printed = command(tasks / "cache", "megatron_dllm.evaluate", *words)
    assert code == 0, printed
    expected = json.loads(output.read_text())["bits_per_byte"]["8"]
    assert found["results"]["toy_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-6)
    nats = expected * math.log(2.0) * sum(len(text.encode()) for text in TEXTS)
    assert sum(-sum(values) for values in _rolling(found)) == pytest.approx(nats, rel=1e-6)


def _rolling(content: dict[str, Any]) -> list[list[float]]:
    return [[float(value) for value in sample["filtered_resps"]] for sample in content["samples"]["toy_rolling"]]


def _written(content: dict[str, Any]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in content["samples"]["toy_writing"]]


def test_texts_are_those_of_generate(found: dict[str, Any], run: Path) -> None:
    config = GenerateConfig(checkpoint=str(run), threshold=0.6, max_new_tokens=20, context_length=64, stop=["cc", "."])
    expected = [generate(replace(config, prompt=choice["question"]))[0] for choice in CHOICES]
    assert _written(found) == [result.text for result in expected]
    assert any(result.generation.stop_reason == "stop" for result in expected)
    num_tokens, num_forwards = (
        sum(values)
        for values in zip(
            *((len(one.generation.generated_ids), one.generation.num_denoising_forwards) for one in expected),
            strict=True,
        )
    )
    assert found["texts"]["toy_writing"]["tokens_per_forward"] == pytest.approx(num_tokens / num_forwards)


def test_a_continuation_is_greedy_where_decoding_token_by_token_gives_it(found: dict[str, Any], tasks: Path) -> None:
    samples = sorted(found["samples"]["toy_greedy"], key=lambda sample: sample["doc_id"])
    assert [str(sample["filtered_resps"][0][1]) for sample in samples] == ["True", "False"]
    assert found["results"]["toy_greedy"]["acc,none"] == 0.5


@pytest.mark.parametrize("words", [[], ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]])
def test_two_ranks_find_the_same(
    words: list[str], found: dict[str, Any], run: Path, tasks: Path, tmp_path: Path
) -> None:
    two = harness(run, tasks, tmp_path / "two.json", ALL, "decoding.threshold=0.6", *words, num_ranks=2)
    assert _written(two) == _written(found)
    assert two["results"]["toy_greedy"]["acc,none"] == found["results"]["toy_greedy"]["acc,none"]
    for values, expected in zip(_scores(two, "toy_choice"), _scores(found, "toy_choice"), strict=True):
        assert values == pytest.approx(expected, rel=1e-5)
    assert _rolling(two) == [pytest.approx(values, rel=1e-5) for values in _rolling(found)]


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers has a class for."""
    folder = tmp_path_factory.mktemp("autoregressive")
    write_synthetic(folder / "hf", QWEN3, dtype=torch.float32)
    write_tokenizer(folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / "hf" / file.name)
    return folder / "hf"


def test_an_autoregressive_model_scores_as_transformers(autoregressive: Path, tasks: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = harness(autoregressive, tasks, tmp_path / "ar.json", "toy_choice,toy_rolling", "parallel.precision=fp32")
    assert found["settings"]["block_size"] is None and found["decisions"]["toy_choice"]["num_unsure"] == 0
    model = AutoModelForCausalLM.from_pretrained(autoregressive, dtype=torch.float32).eval()

    @torch.no_grad()
    def expected(context: list[int], tokens: list[int]) -> float:
        log_p = model(torch.tensor([context + tokens])).logits[0].log_softmax(-1)
        return sum(float(log_p[len(context) - 1 + place, token]) for place, token in enumerate(tokens))

    def ids(text: str) -> list[int]:
        return [VOCAB.index(letter) for letter in text]

    for choice, values in zip(CHOICES, _scores(found, "toy_choice"), strict=True):
        answers = [expected(ids(choice["question"]), ids(f" {text}")) for text in choice["choices"]]
        assert values == pytest.approx(answers, rel=1e-5)
    # Behind the end-of-text token 63 tokens of a window of 64, and the others with as much before them as fits.
    documents = [ids(text) for text in TEXTS]
    whole = [expected([0], text[:63]) for text in documents]
    rest = [expected(text[len(text) - 64 : 63], text[63:]) if len(text) > 63 else 0.0 for text in documents]
    assert sum(value < 0 for value in rest) == 3 and max(map(len, documents)) < 2 * 63
    assert [value for (value,) in _rolling(found)] == pytest.approx(np.add(whole, rest).tolist(), rel=1e-5)


def test_an_autoregressive_model_does_not_write(autoregressive: Path, tasks: Path) -> None:
    for task in ("toy_writing", "toy_greedy"):
        words = [f"checkpoint={autoregressive}", f"tasks=[{task}]", f"include_path={tasks}"]
        code, printed = command(tasks / "cache", "megatron_dllm.harness", *words)
        assert code == 2 and "Traceback" not in printed
        assert f"tasks ({task}) has the model write text, and the checkpoint is autoregressive" in printed


def test_chats_and_examples_change_what_is_asked(found: dict[str, Any], run: Path, tasks: Path, tmp_path: Path) -> None:
    words = ["num_fewshot=1", "apply_chat_template=true", "limit=2", "likelihood.estimator=left_to_right"]
    other = Path(shutil.copytree(run / "tokenizer", tmp_path / "other"))
    (other / "chat_template.jinja").write_text("a word: " + CHAT_TEMPLATE)
    words += ["system_instruction=speak", f"data.tokenizer={other}"]
    chat = harness(run, tasks, tmp_path / "chat.json", "toy_choice", *words)
    samples = chat["samples"]["toy_choice"]
    assert len(samples) == 2 and chat["settings"]["chat_template"] == chat_template_fingerprint(other)
    asked = samples[0]["arguments"][0][0]
    assert asked.startswith("a word: ") and "speak" in asked
    assert asked.count("the cat") + asked.count("once upon a") + asked.count("who") == 2
    assert chat["n-shot"]["toy_choice"] == 1 and _scores(chat, "toy_choice") != _scores(found, "toy_choice")[:2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=[nope.yaml]"], "tasks (nope.yaml) is not a file; name a YAML file"),
        (["include_path=/nope"], "include_path (/nope) is not a folder"),
        (["checkpoint=/nope"], "checkpoint.load (/nope) is not a folder"),
        (["likelihood.fill=pad"], "likelihood.fill (pad) is not known; use one of mask, none, eos."),
        (["block_size=7"], "evaluation.block_sizes (7) must divide context_length (64)"),
        (["block_sizes=[1,4]"], "block_sizes ([1,4]) are for evaluate; this command has one: block_size=N."),
        (["limit=0"], "limit (0.0) must be positive"),
        (["tasks=[]"], "tasks ([]) must name at least one task"),
        (["taks=[toy_choice]"], "taks is not a key of the configuration; did you mean tasks?"),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(words: list[str], message: str, run: Path, tasks: Path) -> None:
    given = {word.partition("=")[0]: word for word in [f"checkpoint={run}", "tasks=[toy_choice]", *words]}
    code, printed = command(tasks / "cache", "megatron_dllm.harness", *given.values())
    assert (code, message in printed, "Traceback" in printed) == (2, True, False), printed


def test_the_block_size_is_the_checkpoint_s_whatever_an_experiment_evaluates(run: Path) -> None:
    composed = compose_words([f"checkpoint={run}", "tasks=[toy_choice]"])
    composed.evaluation.block_sizes = [4, 16]
    assert read_request(composed).names == ("8",)
    composed.block_size = 16
    assert read_request(composed).names == ("16",)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            "empty",
            # Of all but the first question, which the harness itself looks at.
            {"doc_to_choice": "{{['a', 'b'] if question == 'the cat' else ['a', '']}}"},
            "question 1, '': the continuation is empty",
        ),
        ("long", {"description": "a" * 80}, "must fit context_length (64); give fewer examples"),
        ("masked", {"doc_to_text": "<|mask|>"}, "holds the mask token (2)"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_in_a_sentence(
    task: str, changes: dict[str, str], message: str, run: Path, tasks: Path, tmp_path: Path
) -> None:
    changed = yaml.safe_load((tasks / "toy_choice.yaml").read_text()) | changes | {"task": task, "target_delimiter": ""}
    (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(changed))
    words = [f"checkpoint={run}", f"tasks=[{tmp_path / task}.yaml]", f"output={tmp_path / 'new.json'}"]
    code, printed = command(tasks / "cache", "megatron_dllm.harness", *words)
    assert (code, message in printed, "Traceback" in printed) == (2, True, False), printed
    assert not (tmp_path / "new.json").exists()
