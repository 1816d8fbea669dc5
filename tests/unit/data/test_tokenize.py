"""Text in, the same tokens out, whatever the number of workers; nothing is written in halves."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.corpus_writing import tokenize_corpus
from megatron_dllm.data.stdlib_corpus import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN, save_tokenizer, train_tokenizer
from megatron_dllm.data.tokenize import main
from megatron_dllm.data.tokenizer import TextTokenizer, tokenizer_fingerprint
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED

TEXTS = ["def f(x):\n    return x + 1\n", "größe 字 🙂", f"look: {MASK_TOKEN} and {EOS_TOKEN}{PAD_TOKEN}!", "a"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([Path(__file__).read_text()] * 2, 512), folder)
    return str(folder)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "", *TEXTS]))
    return path


def documents_of(prefix: str, folder: str) -> list[list[int]]:
    tokenizer = TextTokenizer.load(folder)
    corpus = Corpus(
        prefix,
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            mask_token_id=tokenizer.mask_token_id,
            pad_token_id=1,
        ),
        folder,
    )
    return [corpus.read(d, 0, int(n)).tolist() for d, n in enumerate(corpus.document_lengths)]


@pytest.mark.ranks
def test_documents_come_back_and_are_described(tokenizer_folder: str, jsonl: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prefix = str(tmp_path / "new" / "out")
    counts = tokenize_corpus([str(jsonl)], tokenizer_folder, prefix)
    hf_tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = documents_of(prefix, tokenizer_folder)
    assert [hf_tokenizer.decode(ids[:-1]) for ids in documents] == TEXTS * 2
    assert all(ids[-1] == 0 for ids in documents)
    description = json.loads(Path(prefix + ".json").read_text())
    expected_bytes = 2 * sum(len(text.encode()) for text in TEXTS)
    expected = {
        "num_documents": 8,
        "num_empty_documents": 1,
        "num_bad_lines": 0,
        "num_bytes": expected_bytes,
        "num_tokens": sum(map(len, documents)),
        "max_token_id": max(map(max, documents)),
        "eos_token_id": 0,
        "mask_token_id": 2,
        "vocab_size": 512,
        "sources": [str(jsonl)],
        "left_out": [],
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer_folder),
    }
    assert {name: description[name] for name in expected} == expected
    assert (counts.num_documents, counts.num_tokens) == (8, expected["num_tokens"])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.bin", "out.idx", "out.json", "out.sums"]


@pytest.mark.ranks
def test_what_is_left_out_of_a_folder_is_said_and_recorded(
    tokenizer_folder: str, jsonl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked.JSONL").symlink_to(jsonl)
    for number in range(25):
        (folder / f"{number:02d}.csv").write_text("id,text")
    tokenize_corpus([str(folder)], tokenizer_folder, str(tmp_path / "out"))
    expected = [f"{folder}/{number:02d}.csv: unknown extension" for number in range(25)]
    assert json.loads((tmp_path / "out.json").read_text())["left_out"] == expected
    said = [message for message in caplog.messages if message.startswith("left out")]
    assert said == [f"left out {entry}" for entry in expected[:20]] + ["left out 5 more, listed in the corpus's .json"]


def test_special_tokens_are_never_made_from_text(tokenizer_folder: str) -> None:
    tokenizer = TextTokenizer.load(tokenizer_folder)
    ids = tokenizer.encode([f"{MASK_TOKEN}{EOS_TOKEN} {PAD_TOKEN}"])[0]
    assert not {0, 1, 2} & set(ids) and len(ids) > 10


def test_mask_token_not_marked_special_is_not_made_from_text_either(tokenizer_folder: str, tmp_path: Path) -> None:
    for path in Path(tokenizer_folder).iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    ids = TextTokenizer.load(tmp_path).encode([MASK_TOKEN + EOS_TOKEN])[0]
    assert not {0, 1, 2} & set(ids)


@pytest.mark.parametrize("text", ["<|MASK|>", "<mask>", "[MASK]"])
def test_every_text_known_for_a_mask_is_found_and_is_not_made_from_text(
    tokenizer_folder: str, tmp_path: Path, text: str
) -> None:
    """A tokenizer that has the token, says nothing about it and does not mark it special."""
    content = (Path(tokenizer_folder) / "tokenizer.json").read_text().replace(MASK_TOKEN, text)
    description = json.loads(content)
    next(token for token in description["added_tokens"] if token["content"] == text)["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS_TOKEN}))
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.mask_token_id == 2
    assert 2 not in tokenizer.encode([f"a{text}b"])[0]


def test_documents_end_in_the_tokenizer_s_own_token(tokenizer_folder: str, tmp_path: Path) -> None:
    """generation_config.json says what stops a chat; it counts where the tokenizer names no token."""
    (tmp_path / "tokenizer.json").write_text((Path(tokenizer_folder) / "tokenizer.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert TextTokenizer.load(tmp_path).eos_token_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS_TOKEN}))
    assert TextTokenizer.load(tmp_path).eos_token_id == 0


@pytest.mark.ranks
def test_number_of_workers_changes_no_byte(tokenizer_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} " * (n % 97)}) + "\n" for n in range(3000)) + "{bad\n")
    for num_workers in (1, 3):
        tokenize_corpus([str(path)], tokenizer_folder, str(tmp_path / f"out{num_workers}"), num_workers=num_workers)
    for suffix in (".bin", ".idx", ".json", ".bad_lines.txt"):
        assert (tmp_path / f"out1{suffix}").read_bytes() == (tmp_path / f"out3{suffix}").read_bytes()


@pytest.mark.ranks
def test_bad_lines_are_counted_and_listed(
    tokenizer_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 70 + b'{"txt": "no key"}\n' * 28 + b'{"text": 3}\n\xff\n')
    prefix = str(tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        counts = tokenize_corpus([str(path)], tokenizer_folder, prefix, max_bad_fraction=0.3)
    assert (counts.num_documents, counts.num_bad_lines) == (70, 30)
    lines = Path(prefix + ".bad_lines.txt").read_text().splitlines()
    assert len(lines) == 30 and lines[0] == f"{path}:71: no key 'text' (it has txt)"
    assert lines[-1] == f"{path}:100: not UTF-8 (byte 0)"
    assert len(caplog.records) == 20
    # Written again without bad lines, the old list goes.
    path.write_bytes(b'{"text": "fine"}\n')
    tokenize_corpus([str(path)], tokenizer_folder, prefix, overwrite=True)
    assert not Path(prefix + ".bad_lines.txt").exists()


@pytest.mark.ranks
def test_too_many_bad_lines_leave_only_their_list(tokenizer_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 98 + b"bad\n" * 2)
    prefix = str(tmp_path / "sub" / "out")
    with pytest.raises(ValueError, match=r"bad documents \(2 of 100\) are more than max_bad_fraction \(0.01\)"):
        tokenize_corpus([str(path)], tokenizer_folder, prefix)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["out.bad_lines.txt"]


@pytest.mark.ranks
def test_existing_output_is_kept(tokenizer_folder: str, jsonl: Path, tmp_path: Path) -> None:
    prefix = str(tmp_path / "out")
    tokenize_corpus([str(jsonl)], tokenizer_folder, prefix)
    expected_bytes = Path(prefix + ".bin").read_bytes()
    with pytest.raises(
        ValueError, match=r"out.bin, .*out.idx, .*out.sums, .*out.json\) exists; choose another --output or add"
    ):
        tokenize_corpus([str(jsonl)], tokenizer_folder, prefix)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"the input \(1 documents, 1 of them empty\) holds no text"):
        tokenize_corpus([str(tmp_path / "empty.txt")], tokenizer_folder, prefix, overwrite=True)
    assert Path(prefix + ".bin").read_bytes() == expected_bytes
    (tmp_path / "other.txt").write_text("something else")
    tokenize_corpus([str(tmp_path / "other.txt")], tokenizer_folder, prefix, overwrite=True)
    assert len(documents_of(prefix, tokenizer_folder)) == 1
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_workers": 0}, r"num_workers \(0\)"), ({"max_bad_fraction": 1.5}, r"max_bad_fraction \(1.5\)")],
)
def test_impossible_settings(tokenizer_folder: str, jsonl: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_corpus([str(jsonl)], tokenizer_folder, str(tmp_path / "out"), **settings)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must be a folder with a tokenizer.json"),
        ({"tokenizer.json": "{"}, r"tokenizer.json is damaged"),
        ({"tokenizer.json": "{}"}, "names no eos_token"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "<e>"}'}, "no token for its eos_token"),
        (
            {
                "tokenizer.json": '{"added_tokens": [{"id": 0, "content": "<e>"}]}',
                "tokenizer_config.json": '{"eos_token": "<e>"}',
            },
            "cannot be read",
        ),
    ],
)
def test_unusable_tokenizer(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        TextTokenizer.load(tmp_path)


def test_eos_that_the_tokenizer_does_not_have(tokenizer_folder: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((Path(tokenizer_folder) / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<none>"}}))
    with pytest.raises(ValueError, match=r"has no token for its eos_token \(<none>\)"):
        TextTokenizer.load(tmp_path)


@pytest.mark.ranks
def test_exit_status(tokenizer_folder: str, jsonl: Path, tmp_path: Path) -> None:
    arguments = ["--input", str(jsonl), "--tokenizer", tokenizer_folder, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--num_workers", "2"]) == 0
    with pytest.raises(ValueError, match="exists; choose another --output"):
        main(arguments)
    assert main([*arguments, "--overwrite", "--num_workers", "1"]) == 0


@pytest.mark.ranks
def test_a_stop_leaves_nothing(tokenizer_folder: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a few words of text " * 10}) + "\n")
    with open(tmp_path / "in.jsonl", "a") as file:
        file.writelines([json.dumps({"text": "some more of them " * 10}) + "\n"] * 200_000)
    words = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", tokenizer_folder, "--num_workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_dllm.data.tokenize", *words, "--output", str(tmp_path / "new" / "out")],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not any(path.stat().st_size for path in tmp_path.glob("new/out.tmp-*.bin")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_PREEMPTED and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != Path(tokenizer_folder).name) == ["in.jsonl"]
