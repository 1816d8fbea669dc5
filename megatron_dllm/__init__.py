"""Mutes, before anything imports megatron-core, what it and torch say about each other on every rank.

This is the one place that runs before every import of megatron-core. The missing packages are reported once, by
`host.prepare_host`, where they matter.
"""

import warnings

warnings.filterwarnings("ignore", message="(Apex is|Transformer Engine and Apex are) not installed")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron\.core|torch\.distributed)\.")
