"""Real text that every machine has: the standard library of the Python that runs this.

    python -m megatron_dllm.data.stdlib_corpus --output DIR

writes DIR/train.jsonl and DIR/validation.jsonl (a document is a .py or .txt file), DIR/tokenizer (a
byte-level BPE trained on a part of it, with a chat template, as a HF folder) and DIR/corpus.json (what
it was made from). A second call with the same settings finds it finished and does nothing.

Left out are installed packages, compiled files, text that is not UTF-8, `encodings` (character maps) and
other files that are tables rather than text: fewer than half of their visible characters are letters.
A Python without its test suite (Debian's, for one) gives about a third of the text.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_dllm.run.files import read_json_object, write_json

logger = logging.getLogger(__name__)

EOS_TOKEN, PAD_TOKEN, MASK_TOKEN = "<|endoftext|>", "<|pad|>", "<|mask|>"
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = """\
{%- for m in messages %}
{%- if m.role not in ["system", "user", "assistant"] %}{{ raise_exception("unknown role " ~ m.role) }}{% endif %}
{{- "<|" ~ m.role ~ "|>" ~ m.content ~ "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}"""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings"}
_SUFFIXES = {".py", ".txt"}
_TOKENIZER_TRAINING_BYTES = 8_000_000
_SMALLEST_VOCABULARY = 512


def list_documents(root: Path) -> list[str]:
    """Paths, relative to `root`, of the files that may be documents, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names if Path(name).suffix in _SUFFIXES]
    return sorted(found)


def read_document(path: Path) -> str | None:
    """The text of a file; None where it is empty, not UTF-8 or a table."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    visible = "".join(text.split())
    is_text = bool(visible) and 2 * sum(map(str.isalpha, visible)) >= len(visible)
    return text if is_text else None


def is_validation(path: str, fraction: float) -> bool:
    """Whether a document is held out: decided by its path alone, so it never changes sides."""
    return _hash("split", path) < fraction * 2**64


def build(
    output: Path, *, vocab_size: int = 4096, validation_fraction: float = 0.05, max_bytes: int | None = None
) -> dict[str, Any]:
    """Write the corpus and its tokenizer.

    Args:
        output: folder to create.
        vocab_size: of the tokenizer, special tokens included.
        validation_fraction: share of documents held out.
        max_bytes: stop before the documents exceed this many UTF-8 bytes, taken in an order without
            relation to their contents; None: all.

    Returns:
        What DIR/corpus.json holds.

    Raises:
        ValueError: for impossible settings, or where `output` holds something else.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be at least {_SMALLEST_VOCABULARY}: 256 bytes, "
            "7 special tokens and some words."
        )
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction ({validation_fraction}) must lie between 0 and 1.")
    root = Path(sysconfig.get_path("stdlib"))
    documents = _select(root, max_bytes)
    is_held_out = {path: is_validation(path, validation_fraction) for path in documents}
    if len(set(is_held_out.values())) < 2:
        raise ValueError(
            f"max_bytes ({max_bytes}) leaves {len(documents)} documents, too few to hold some out with "
            f"validation_fraction {validation_fraction}; raise either."
        )
    description = {
        "format": 2,
        "vocab_size": vocab_size,
        "validation_fraction": validation_fraction,
        "python": sys.version.split()[0],
        "sha256": _fingerprint(documents),
        **{
            f"num_{name}_{unit}": count
            for name, held_out in (("train", False), ("validation", True))
            for unit, count in _count(documents, is_held_out, held_out).items()
        },
    }
    if output.exists():
        _check_finished(output, description)
        return description
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name, held_out in (("train", False), ("validation", True)):
            part = {path: text for path, text in documents.items() if is_held_out[path] == held_out}
            _write_lines(temporary / f"{name}.jsonl", part)
        training_texts = [text for path, text in documents.items() if not is_held_out[path]]
        save_tokenizer(train_tokenizer(training_texts, vocab_size), temporary / "tokenizer")
        (temporary / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        write_json(temporary / "corpus.json", description, indent=2)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info(f"wrote {output}: {description}")
    return description


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with the special tokens at ids 0 to 6, trained on a sample of the texts."""
    sample: list[str] = []
    num_bytes = 0
    for text in random.Random(0).sample(texts, len(texts)):
        num_bytes += len(text.encode("utf-8"))
        if sample and num_bytes > _TOKENIZER_TRAINING_BYTES:
            break
        sample.append(text)
    tokenizer = Tokenizer(models.BPE())
    # A digit is a token, so that numbers can be read and written digit by digit.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN, MASK_TOKEN, *CHAT_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that transformers.AutoTokenizer loads."""
    folder.mkdir(parents=True, exist_ok=True)
    special_tokens = {"eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN, "mask_token": MASK_TOKEN}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
        **special_tokens,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_tokens)):
        write_json(folder / name, content, indent=2)


def _select(root: Path, max_bytes: int | None) -> dict[str, str]:
    """Path to text of the documents, sorted by path; a part of them is chosen by the hash of the path."""
    chosen, num_bytes = {}, 0
    for path in sorted(list_documents(root), key=partial(_hash, "select")):
        text = read_document(root / path)
        if text is None:
            continue
        num_bytes += len(text.encode("utf-8"))
        if max_bytes is not None and num_bytes > max_bytes:
            break
        chosen[path] = text
    return dict(sorted(chosen.items()))


def _hash(purpose: str, path: str) -> int:
    """64 bits that look random, others for every purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{path}".encode()).digest()[:8], "big")


def _fingerprint(documents: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for path, text in documents.items():
        digest.update(f"{path}\0{len(text)}\0{text}\0".encode())
    return digest.hexdigest()


def _count(documents: dict[str, str], is_held_out: dict[str, bool], held_out: bool) -> dict[str, int]:
    texts = [text for path, text in documents.items() if is_held_out[path] == held_out]
    return {"documents": len(texts), "bytes": sum(len(text.encode("utf-8")) for text in texts)}


def _check_finished(output: Path, description: dict[str, Any]) -> None:
    path = output / "corpus.json"
    if not path.is_file():
        raise ValueError(f"output ({output}) exists and is no standard library corpus; choose another folder.")
    found = read_json_object(path, "choose another folder or delete it")
    different = sorted(name for name in description if found.get(name) != description[name])
    if different:
        raise ValueError(
            f"output ({output}) was made with other settings or another Python ({', '.join(different)}); "
            "choose another folder or delete it."
        )
    logger.info(f"{output} is finished already: {found}")


def _write_lines(path: Path, documents: dict[str, str]) -> None:
    lines = ({"text": text, "path": name} for name, text in documents.items())
    with path.open("w", encoding="utf-8") as file:
        for line in _shown(lines, len(documents), path.name):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _shown(items: Iterator[dict[str, str]], total: int, label: str) -> Iterator[dict[str, str]]:
    yield from track(items, description=label, total=total, console=Console(stderr=True))


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dllm.data.stdlib_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer, special tokens included")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="share of documents held out")
    parser.add_argument("--max_bytes", type=int, default=None, help="use so many bytes of text at most")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    build(
        options.output,
        vocab_size=options.vocab_size,
        validation_fraction=options.validation_fraction,
        max_bytes=options.max_bytes,
    )
    return 0


if __name__ == "__main__":
    run_command(main)
