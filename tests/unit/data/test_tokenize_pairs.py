"""Pairs in, a corpus of chosen and rejected documents out, by the command that users type."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.chat_view import show_chats
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.corpus_writing import tokenize_corpus
from megatron_dllm.data.pair_encoding import PairEncoding
from megatron_dllm.data.reading import RawDocument
from megatron_dllm.data.tokenize import main
from megatron_dllm.data.verify import verify
from tests.unit.data.chat_folders import GENERATION, MERGING, REASONING, write_chat_tokenizer

MODEL = ModelConfig(vocab_size=400, eos_token_id=0, pad_token_id=1, mask_token_id=2)
ASKED = {"role": "user", "content": "Hi"}


def said(content: str) -> dict:
    return {"role": "assistant", "content": content}


PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
TURNS = [ASKED, said("Yes?"), {"role": "user", "content": "Bye"}]
LONG = {"chosen": [*TURNS, said("Bye, bye, bye!")], "rejected": [*TURNS, said("No")]}
EQUAL = {"prompt": "Hi", "chosen": "Go", "rejected": "Go"}
EMPTY = {"prompt": "Hi", "chosen": "Hello", "rejected": ""}
OTHER_PROMPT = {"chosen": [ASKED, said("Go")], "rejected": [{"role": "user", "content": "Ho"}, said("Go!")]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def raw(record: dict) -> RawDocument:
    return RawDocument("x:1", json.dumps(record).encode(), is_json=True)


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.ranks
def test_a_corpus_of_pairs(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "in.jsonl", [PAIR, EQUAL, OTHER_PROMPT, EMPTY, LONG])
    prefix = str(tmp_path / "out")
    arguments = ["--input", str(path), "--tokenizer", folder, "--kind", "pairs", "--max_bad_fraction", "0.3"]
    assert main([*arguments, "--output", prefix, "--num_workers", "1"]) == 0
    corpus = Corpus(prefix, MODEL, folder)
    assert corpus.is_paired and len(corpus.document_lengths) == 4
    decode = PairEncoding(folder).load().decode
    texts = [decode(corpus.read(n, 0, length).tolist()) for n, length in enumerate(corpus.document_lengths.tolist())]
    spans = corpus.spans
    assert spans is not None
    answers = [decode(corpus.read(n, start, stop - start).tolist()) for n, (start, stop, _) in enumerate(spans.table)]
    assert answers == ["Hello<|im_end|>", "Go<|im_end|>", "Bye, bye, bye!<|im_end|>", "No<|im_end|>"]
    prompts = [text.removesuffix(answer) for text, answer in zip(texts, answers, strict=True)]
    assert prompts[0] == prompts[1] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[2] == prompts[3] and "Yes?" in prompts[2]
    assert [corpus.sample_id(number, 0) for number in range(4)] == [0, 1, 2, 3]
    description = json.loads(Path(prefix + ".json").read_text())
    counted = {name: description[f"num_{name}"] for name in ("pairs", "documents", "bad_lines", "equal_dropped")}
    assert counted == {"pairs": 4, "documents": 4, "bad_lines": 1, "equal_dropped": 1}
    assert description["num_empty_dropped"] == 1 and description["kind"] == "pairs"
    lengths = [stop - start for start, stop, _ in spans.table.tolist()]
    assert description["num_chosen_tokens"] == lengths[0] + lengths[2]
    assert description["num_rejected_tokens"] == lengths[1] + lengths[3]
    assert "of 4 pairs 1 had two equal answers, 1 an empty one" in caplog.text
    assert "every byte as it was written" in verify(prefix)
    assert "the prompt differs between chosen and rejected" in (tmp_path / "out.bad_lines.txt").read_text()


@pytest.mark.ranks
def test_rows_of_parquet_are_pairs(folder: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([LONG, LONG]), tmp_path / "in.parquet")
    lines = write_lines(tmp_path / "in.jsonl", [LONG, LONG])
    for path in (lines, tmp_path / "in.parquet"):
        tokenize_corpus([str(path)], folder, str(path) + ".out", chats=PairEncoding(folder))
    for suffix in (".bin", ".spans"):
        expected_bytes = (tmp_path / f"in.jsonl.out{suffix}").read_bytes()
        assert (tmp_path / f"in.parquet.out{suffix}").read_bytes() == expected_bytes


def test_a_pair_with_one_side_too_long_is_dropped_and_counted(folder: str) -> None:
    whole = PairEncoding(folder).load().encode([raw(LONG)])
    assert len(whole.lengths) == 2 and whole.lengths[0] > whole.lengths[1]
    for max_length, expected_documents in ((whole.lengths[0], 2), (whole.lengths[0] - 1, 0), (whole.lengths[1], 0)):
        batch = PairEncoding(folder, max_length).load().encode([raw(LONG)])
        assert len(batch.lengths) == expected_documents
        assert batch.tally.get("num_overlong_dropped", 0) == (expected_documents == 0)


@pytest.mark.parametrize("template", [REASONING, GENERATION, MERGING], ids=["reasoning", "generation", "merging"])
def test_only_the_last_answer_carries_a_loss_and_the_prompt_is_the_same(tmp_path: Path, template: str) -> None:
    batch = PairEncoding(write_chat_tokenizer(tmp_path, template)).load().encode([raw(LONG)])
    assert batch.spans is not None and batch.spans.bounds.tolist() == [0, 1, 2], (
        "an earlier answer is part of the prompt"
    )
    (start, stop, _), (other_start, other_stop, _) = batch.spans.table.tolist()
    chosen, rejected = batch.tokens[: batch.lengths[0]].tolist(), batch.tokens[batch.lengths[0] :].tolist()
    assert start == other_start and chosen[:start] == rejected[:start]
    assert (stop, other_stop) == (len(chosen), len(rejected)), "a document ends with the end of its answer"


def test_both_sides_are_shown(folder: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [PAIR, EMPTY, LONG])
    screen = StringIO()
    show_chats([path], PairEncoding(folder), 2, console=Console(file=screen, width=200))
    shown = screen.getvalue()
    assert f"{path}:1, chosen, " in shown and f"{path}:1, rejected, " in shown
    assert "[Hello<|im_end|>]" in shown and "[Go<|im_end|>]" in shown
    assert f"{path}:2: rejected is empty" in shown and "Bye" not in shown


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([EQUAL, EMPTY], [], "the input (2 pairs, 0 of them bad) holds no document to train on; 0 were longer than"),
        ([EQUAL, EMPTY], [], "1 had two equal answers, 1 an empty one: give more pairs"),
        ([PAIR], ["--max_length", "3"], "1 were longer than max_length"),
        ([OTHER_PROMPT, PAIR], [], "bad documents (1 of 2) are more than max_bad_fraction (0.01)"),
        ([PAIR], ["--overlong", "truncate"], "overlong (truncate) is for chats alone: half an answer is no preference"),
        ([PAIR], ["--max_length", "1"], "max_length (1) must be at least 2"),
    ],
)
def test_what_gives_no_corpus(
    folder: str, tmp_path: Path, records: list[dict], options: list[str], message: str
) -> None:
    path, prefix = write_lines(tmp_path / "in.jsonl", records), tmp_path / "out"
    arguments = ["--input", str(path), "--tokenizer", folder, "--kind", "pairs", "--output", str(prefix)]
    with pytest.raises(ValueError, match=re.escape(message)):
        main([*arguments, *options])
    assert not Path(f"{prefix}.json").exists() and not Path(f"{prefix}.bin").exists()
