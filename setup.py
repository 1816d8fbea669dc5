"""Package metadata. Each dependency stands here with the reason it is needed."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL = [
    "torch>=2.11",  # tensors, autograd, collectives, grouped products; FlexAttention on GPUs
    "megatron-core==0.16.1",  # the engine: layers, parallelism, optimizer, schedules, checkpoints, datasets
    "numpy>=1.26",  # Philox noise, row packing
    "hydra-core==1.3.2",  # recipes: composition and overrides
    "omegaconf==2.3.0",  # the strict schema behind the recipes
    "safetensors>=0.4.3",  # HF weights, read and written without pickle
    "tokenizers>=0.20",  # tokenizing text, training the demo's tokenizer
    "transformers>=4.57",  # tokenizer folders; the exported folder loads through it
    "jinja2>=3.1",  # chat templates, which transformers renders
    "pyarrow>=16",  # .parquet corpora
    "zstandard>=0.22",  # .zst corpora, with windows of up to 2 GiB
    "rich>=13",  # tables and progress bars
    "tqdm>=4.66",  # progress bars of the checkpoint tools
    "matplotlib>=3.8",  # the pictures of the report
    "tensorboard>=2.16",  # metrics
    "wandb>=0.17",  # metrics, offline too
    "packaging>=24.2",  # comparing versions of packages
    "psutil>=5.9",  # megatron-core's checkpoint writer dies without it
    "pybind11>=2.12",  # megatron-core's dataset helpers
]
EXTRAS = {
    "gpu": ["transformer-engine[pytorch]>=2.3"],  # TE linear layers, grouped experts, FusedAdam
    "offload": ["deepspeed>=0.17"],  # Adam of the host's memory (optimizer.offload_adam=deepspeed)
    "slurm": ["hydra-submitit-launcher==1.2.0", "submitit>=1.5"],  # sweeps on SLURM
    "eval": ["lm-eval>=0.4.13,<0.5"],  # the tasks of lm-evaluation-harness (megatron_dllm.harness)
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],  # the pages and a reference as a site
    "dev": [
        "lm-eval>=0.4.13,<0.5",  # the tests of the harness
        "pytest>=8",
        "pytest-xdist>=3.6",  # make test on every core
        "ruff>=0.6",  # lint and format
        "mypy>=1.11",
        "import-linter>=2.1",  # which package may import which
        "pre-commit>=3.8",  # make check's quick part at every commit
    ],
}

setup(
    name="megatron_dllm",
    version="0.1.0",
    description="Turn an autoregressive mixture-of-experts LLM into a block-diffusion LLM on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The recipes lie beside the packages, where people read them, and inside one when installed.
    packages=[*find_packages(include=["megatron_dllm*", "checkpoints_tools*", "launch*"]), "megatron_dllm.recipes"],
    package_dir={"megatron_dllm.recipes": "recipes"},
    package_data={"megatron_dllm": ["hf/modeling/*.py"], "megatron_dllm.recipes": ["*.yaml", "*/*.yaml", "*/*.jsonl"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
)
