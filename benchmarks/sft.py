"""Supervised fine-tuning: padding of packed chats, the step against padding every chat to the longest, tokenizing.

    python -m benchmarks.sft

Chats of log-normal questions and answers (one to three of each) are packed and trained by the program's own code. They
are compared with the layout of trainers without packing: a row for each chat, as long as the longest one takes with all
of its copies, nothing left out. Both train the same chats with the same noise, model and step (forward and backward,
without the optimizer); the losses are checked to agree before anything is timed. Times are CPU seconds of one thread,
the shortest of some repetitions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.config import ModelConfig, NoiseConfig, ParallelConfig, SftConfig, StageConfig
from megatron_dllm.data.batch import Batch, collate
from megatron_dllm.data.chat_encoding import ChatEncoding
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import RowPlan, RowStream, estimate_fill
from megatron_dllm.data.reading import RawDocument
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.data.stdlib_corpus import save_tokenizer, train_tokenizer
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.model.objective import objective_of

VIEWS, EOS, PAD, MASK = 2, 0, 1, 2
STAGE = StageConfig(
    block_size=32,
    num_tokens=1,
    global_batch_size=1,
    learning_rate=1.0,
    loss_weight="uniform",
    num_views=VIEWS,
    view_relation="complementary",
    t_min=0.2,
    t_max=0.8,
    sft=SftConfig(),
)
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=8192,
    num_dense_layers=1,
    num_moe_experts=16,
    moe_ffn_hidden_size=128,
    moe_shared_expert_intermediate_size=128,
    moe_router_topk=4,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    mask_token_id=MASK,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
TEMPLATE = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
NOTE = (
    "packed: rows filled with chats, prompts without noisy copies; padded: a row for each chat, as long as the longest "
    "takes, with all copies. Both skip the attention of padding. model_tokens: tokens of the rows, padding included, "
    "for each supervised token; an answer's tokens and its fill count once, whatever their views. ratio: supervised "
    "tokens per second over those of padded. Tokenizing: one process."
)


@dataclass(frozen=True)
class Chats:
    """Chats of random tokens, as a source."""

    document_lengths: NDArray[np.int64]
    spans: Spans
    name: str = "chats"
    num_bytes: None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all chats."""
        return int(self.document_lengths.sum())

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """[length] int64 random tokens."""
        tokens = np.random.default_rng(document).integers(MASK + 1, MODEL.vocab_size, self.document_lengths[document])
        return tokens[offset : offset + length]

    def sample_id(self, document: int, offset: int) -> int:
        """The document and the place in it."""
        return (document << 20) + offset


def draw_chats(num_chats: int, context_length: int, median: float, sigma: float, seed: int = 0) -> Chats:
    """Chats whose questions and answers have log-normal lengths; those that do not fit the context are left out."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    documents: list[list[tuple[int, int, int]]] = []
    while len(lengths) < num_chats:
        parts = np.maximum(rng.lognormal(np.log(median), sigma, 2 * rng.integers(1, 4)), 4).astype(int)
        stops = np.cumsum(parts).tolist()
        if stops[-1] <= context_length:
            lengths.append(stops[-1])
            documents.append([(stops[i], stops[i + 1], MASKABLE) for i in range(0, len(stops), 2)])
    return Chats(np.array(lengths), Spans.of_lists(documents))


def packed_geometry(context_length: int, row_length: int) -> RowGeometry:
    """Rows as training packs them."""
    return RowGeometry(
        "block_diffusion", STAGE.block_size, context_length, row_length, VIEWS, fill="eos", turn_boundary="split_views"
    )


def padded_geometry(longest: int) -> RowGeometry:
    """Rows for one chat each, the longest of which has `longest` tokens, and a block more for each of its turns."""
    blocks = -(-longest // STAGE.block_size) + 3
    size = blocks * STAGE.block_size
    return RowGeometry(
        "block_diffusion",
        STAGE.block_size,
        size,
        (VIEWS + 1) * size,
        VIEWS,
        prune_clean=False,
        fill="eos",
        turn_boundary="split_views",
    )


def rows_of(source: Chats, geometry: RowGeometry, plans: Sequence[RowPlan]) -> list[Batch]:
    """Micro-batches of one row."""
    noise = NoiseSpec.for_stage(NoiseConfig(), STAGE)
    dataset = RowDataset(source, geometry, noise, 0, MASK, PAD, EOS)
    return [collate([dataset[plan]]) for plan in plans]


def packed_and_padded(source: Chats, geometry: RowGeometry, num_rows: int) -> tuple[list[Batch], list[Batch]]:
    """The same chats in both layouts."""
    stream = RowStream(source.document_lengths, 0, 1024, spans=source.spans)
    plans = [stream.next(geometry) for _ in range(num_rows)]
    segments = np.concatenate([plan.segments for plan in plans])
    alone = [RowPlan(segments[place : place + 1], 0) for place in range(len(segments))]
    longest = int(source.document_lengths[segments[:, 0]].max())
    return rows_of(source, geometry, plans), rows_of(source, padded_geometry(longest), alone)


def train(model: Any, batches: list[Batch]) -> float:
    """Forward and backward of all rows; the loss per supervised token."""
    objective = objective_of(STAGE, NoiseConfig())
    count = sum(int(batch.num_maskable) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = objective.loss(batch, model(batch)).total / count
        loss.backward()
        total += loss.item()
    return total


def shortest_seconds(run: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the fastest of some runs."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return min(seconds)


def measure_steps(source: Chats, geometry: RowGeometry, num_rows: int, repeats: int) -> list[dict[str, Any]]:
    """A line for each layout."""
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import single_rank

    layouts = dict(zip(("padded", "packed"), packed_and_padded(source, geometry, num_rows)[::-1], strict=True))
    lines: list[dict[str, Any]] = []
    with single_rank(0) as groups:
        model = build_model(MODEL, ParallelConfig(), groups)
        losses = {name: train(model, batches) for name, batches in layouts.items()}
        assert abs(losses["packed"] - losses["padded"]) < 1e-4 * losses["padded"], f"the layouts differ: {losses}"
        for name, batches in layouts.items():
            supervised = sum(int(batch.num_maskable) for batch in batches) / VIEWS
            model_tokens = sum(batch.input_ids.numel() for batch in batches)
            used = sum(int(batch.num_forward_tokens) for batch in batches)
            seconds = shortest_seconds(lambda batches=batches: train(model, batches), repeats)  # type: ignore[misc]
            document = sum(int(batch.num_document_tokens) for batch in batches)
            lines.append(
                dict(
                    layout=name,
                    rows=len(batches),
                    row_length=batches[0].input_ids.shape[1],
                    padding_percent=100 * (1 - used / model_tokens),
                    model_tokens=model_tokens / supervised,
                    seconds=seconds,
                    document_tokens_per_second=document / seconds,
                    supervised_tokens_per_second=supervised / seconds,
                    ratio=supervised / seconds / lines[0]["supervised_tokens_per_second"] if lines else 1.0,
                )
            )
            print(lines[-1], flush=True)
    return lines


def measure_padding(source: Chats, context_length: int, row_lengths: Sequence[int]) -> list[dict[str, Any]]:
    """How much of packed rows is padding."""
    lines = []
    for row_length in row_lengths:
        geometry = packed_geometry(context_length, row_length)
        fill = estimate_fill(source.document_lengths, geometry, seed=0, chunk=4096, spans=source.spans)
        lines.append(
            dict(
                row_length=row_length,
                document_tokens=fill.document_tokens,
                padding_percent=100 * fill.padding_tokens / row_length,
            )
        )
        print(lines[-1], flush=True)
    return lines


def measure_tokenizing(num_chats: int, repeats: int) -> dict[str, Any]:
    """Chats per second of one process, from the JSON line to tokens and spans."""
    rng = np.random.default_rng(0)
    words = ["answer", "the", "of", "question", "block", "a", "token", "model", "in", "noise"]
    documents = []
    for number in range(num_chats):
        sizes = np.maximum(rng.lognormal(np.log(60), 0.8, 2 * rng.integers(1, 4)), 2).astype(int)
        texts = [" ".join(rng.choice(words, size)) for size in sizes]
        messages = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]
        documents.append(RawDocument(f"chats:{number}", json.dumps(dict(messages=messages)).encode(), is_json=True))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer([" ".join(words) * 20], 400)
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        save_tokenizer(tokenizer, Path(folder))
        (Path(folder) / "chat_template.jinja").write_text(TEMPLATE)
        encoder = ChatEncoding(folder).load()
        encoded = encoder.encode(documents)
        assert not encoded.bad, encoded.bad[:1]
        seconds = shortest_seconds(lambda: encoder.encode(documents), repeats)
    return dict(
        chats=num_chats,
        tokens=len(encoded.tokens),
        chats_per_second=num_chats / seconds,
        tokens_per_second=len(encoded.tokens) / seconds,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context_length", type=int, default=2048)
    parser.add_argument("--row_length", type=int, default=8192)
    parser.add_argument("--median", type=float, default=100.0, help="tokens of the median question and answer")
    parser.add_argument("--sigma", type=float, default=0.9, help="of the logarithm of their lengths")
    parser.add_argument("--chats", type=int, default=20_000, help="chats whose padding is counted")
    parser.add_argument("--rows", type=int, default=2, help="packed rows of a step")
    parser.add_argument("--tokenized", type=int, default=500, help="chats that are tokenized")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "sft", help="without suffix")
    args = parser.parse_args()
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    torch.set_num_threads(1)
    source = draw_chats(args.chats, args.context_length, args.median, args.sigma)
    row_lengths = [args.row_length, 2 * args.row_length]
    tables = {
        "padding": measure_padding(source, args.context_length, row_lengths),
        "step": measure_steps(source, packed_geometry(args.context_length, args.row_length), args.rows, args.repeats),
        "tokenizing": [measure_tokenizing(args.tokenized, args.repeats)],
    }
    about = machine() | {
        name: getattr(args, name) for name in ("context_length", "median", "sigma", "chats", "repeats")
    }
    write_results(args.output, "Supervised fine-tuning", about, tables, NOTE)


if __name__ == "__main__":
    main()
