"""What the commands that ask one checkpoint questions share: their options, and the loaded model that answers."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from megatron_dllm.config import DecodingConfig, GenerateConfig
from megatron_dllm.config.rules import check_positive
from megatron_dllm.data.tokenizer import load_tokenizer
from megatron_dllm.evaluation.questions import Question, read_questions
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from megatron_dllm.inference.prompts import encode_requests
from megatron_dllm.inference.source import read_source
from megatron_dllm.run.stream import check_new

if TYPE_CHECKING:
    from megatron_dllm.evaluation.answering import Decoded
    from megatron_dllm.inference.decoder import Decoder


@dataclass(frozen=True)
class Asked:
    """A checkpoint, and what it is asked.

    Attributes:
        questions: of a file of chats.
        prompts: token ids of each question.
        tokenizer: of the checkpoint.
        decoder: of the loaded model.
    """

    questions: Sequence[Question]
    prompts: Sequence[Sequence[int]]
    tokenizer: Tokenizer
    decoder: Decoder

    def decoded(self, config: DecodingConfig) -> Decoded:
        """All questions by this rule and length, as a study decodes them."""
        from megatron_dllm.evaluation.answering import decode_questions

        return decode_questions(self.decoder, self.questions, self.prompts, self.tokenizer, config)


def question_parser(name: str, description: str | None, output: str) -> argparse.ArgumentParser:
    """The options of such a command, to which it adds its own.

    Args:
        name: of its module.
        description: of what it does.
        output: what it writes.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint or exported folder")
    parser.add_argument("--chats", type=Path, required=True, help=".jsonl file of chats that end with an answer")
    parser.add_argument("--output", type=Path, required=True, help=output)
    parser.add_argument("--limit", type=int, default=None, help="questions of each task; all without it")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--batch_size", type=int, default=64, help="questions in the same passes")
    return parser


def tell() -> None:
    """Have the command's own messages printed."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("megatron_dllm").setLevel(logging.INFO)


@contextmanager
def asking(options: argparse.Namespace, config: GenerateConfig) -> Iterator[Asked]:
    """Load the checkpoint with what it is to be asked; both go with the block.

    Args:
        options: of `question_parser`.
        config: validated.

    Raises:
        ValueError: an impossible option, checkpoint or chat; before the weights are read wherever possible.
    """
    check_new(options.output)
    for name in ("limit", "batch_size"):
        if getattr(options, name) is not None:
            check_positive(name, getattr(options, name))
    questions = read_questions(options.chats, options.limit)
    source = read_source(config)
    tokenizer = load_tokenizer(TokenizerFiles(source.tokenizer))
    prompts, contract = encode_requests([question.chat for question in questions], tokenizer, source)
    # megatron-core takes seconds to import, which a wrong setting should not cost.
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.inference.decoder import Decoder
    from megatron_dllm.inference.load import load_model
    from megatron_dllm.parallel.groups import single_rank

    with single_rank(config.seed) as groups:
        model = load_model(source, groups, config.precision, config.attention_backend)
        decoder = Decoder(model, groups, contract, options.batch_size)
        yield Asked(questions, [prompt.ids for prompt in prompts], tokenizer, decoder)
