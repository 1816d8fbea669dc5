# make demo: the whole pipeline from nothing. make check, make test: what a change must pass. All create .venv if there
# is none.
PYTHON ?= python3
# The torch build to install. The pin takes the CPU build where one is offered; on a GPU machine name yours, e.g.
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-record docs check unit test test-slow test-all test-slurm test-transformers4 install parity kill study sft-study dpo-study study-methods tiny-methods-study clean

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev,slurm]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python launch/local.py experiment=tiny_demo

# The demo, its tables for the README in benchmarks/results/demo.md, and the two pictures of it in docs/images.
demo-record: demo
	$(BIN)/python -m benchmarks.demo

# Lint, format, types, layers, and that what README and docs name exists: under half a minute.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit/test_docs.py tests/unit/test_architecture.py

# The tests by what they cost (tests/plugins/tiers.py). A file's tests stay in one process, which keeps its fixtures, and
# files in their order: of the files with few tests some cost most, and would else come last, in one process.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# In pytest's own processes, nothing compiled: nine minutes of CPU.
unit: install
	$(PYTEST) -m fast tests/unit

# These and all that start ranks or programs: half an hour of CPU.
test: install
	$(PYTEST) -m "fast or ranks"

# What takes some twenty seconds of CPU or more, or compiles.
test-slow: install
	$(PYTEST) -m "slow and not slurm"

# Both at once, so that a run which several tests read is made once.
test-all: install
	$(PYTEST) -m "not slurm"

# A real SLURM of virtual nodes on this machine; needs: apt-get install -y slurm-wlm slurmctld slurmd munge shellcheck
# Its tests mostly wait: with SLURM_WORKERS=3 (at most 4) so many clusters run side by side, a file of tests on each.
SLURM_TESTS ?= slurm
SLURM_WORKERS ?= 1
test-slurm: install
	$(BIN)/python -m pytest -n $(SLURM_WORKERS) --dist loadfile -m "$(SLURM_TESTS)" tests/slurm

# Models that transformers 4.57 has saved convert, and exported ones load and decode under it; it goes into a folder of
# its own.
TRANSFORMERS4 := $(abspath $(VENV))/transformers4
test-transformers4: install
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(TRANSFORMERS4) \
		transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	PYTHONPATH=$(TRANSFORMERS4) $(BIN)/python -m pytest -m "ranks or slow" \
		tests/integration/test_conversion.py tests/integration/test_export.py tests/integration/test_families.py \
		tests/integration/test_first_conversion.py

# These pages and the reference as a site in site/; a link that leads nowhere fails.
docs: install
	$(BIN)/pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every parallel layout against one rank; writes benchmarks/results/parity.md. Minutes on two free cores.
parity: install
	$(BIN)/python -W ignore -m benchmarks.parity

# 30 ranks killed at random moments, with checkpoints written in and behind training; writes benchmarks/results/kill.md
kill: install
	$(BIN)/python -W ignore -m benchmarks.kill --kills 30

clean:
	rm -rf runs/demo

# Three seeds of SFT and CAP from the demo's merge, and of SFT from random weights; writes
# benchmarks/results/tiny_sft_study.md. About an hour.
sft-study: demo
	$(BIN)/python launch/local.py experiment=tiny_sft_study

# Preferences on the demo's own answers: three seeds of 1, 4 and 8 views, masks shared with the reference or not; writes
# benchmarks/results/tiny_dpo_study.md. Over an hour.
dpo-study: demo
	$(BIN)/python launch/local.py experiment=tiny_dpo_study

study: demo
	$(BIN)/python launch/local.py experiment=tiny_study

# Is a clean half that stays autoregressive worth it? Arms at equal floating-point operations, two sizes, seeds: over two
# hours of a core. It may be stopped and given again; writes benchmarks/results/ar_guided.md after each arm.
study-methods: install
	$(BIN)/python -m benchmarks.ar_guided

# The field's methods from one AR model, at equal document tokens and at equal operations, three seeds: an hour and a half
# of a core. It may be stopped and given again; writes benchmarks/results/methods_study.md after each run.
tiny-methods-study: install
	$(BIN)/python -m benchmarks.methods_study
