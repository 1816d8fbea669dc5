"""Names of the files and folders in a run folder and in a checkpoint (standard library only).

RUN/config.yaml       the configuration of the newest start
RUN/git.txt           the code that ran: the commit, and what was changed since
RUN/starts.jsonl      a line for every start, see run/history.py
RUN/metrics.jsonl     a record of every logged step and validation
RUN/checkpoints/      see checkpoint/folder.py
RUN/tokenizer/        the tokenizer that made the corpus
RUN/lease/            see run/lease.py
RUN/replay/           the batches of steps whose loss or gradient was not finite
RUN/tensorboard/      the curves for TensorBoard
RUN/wandb_id          the id under which W&B knows the run, and whether it was closed in order
"""

from __future__ import annotations

CONFIG = "config.yaml"
CODE_STATE = "git.txt"
STARTS = "starts.jsonl"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
LEASE = "lease"
REPLAY = "replay"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"

LATEST = "latest"
CONTRACT = "contract.json"
STATE = "state.json"
MANIFEST = "manifest.json"
VALIDATION = "validation.json"
HARNESS = "harness.json"
NEEDLE = "needle.json"
