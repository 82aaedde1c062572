# On a bare machine every target first makes `.venv` (once; again when pyproject.toml changes).
#
#   make demo        an unmodified Llama through model.generate: eager, Inductor, layerzero side by side
#   make test        the tests that need neither a GPU nor much time (under 10 minutes on 2 cores)
#   make test-slow   all the others that this machine can run
#   make mutate      takes every guard of patterns/ away in turn: some test must fail (an hour or two; goes on where it stopped)
#   make lint        ruff, and the import contracts of pyproject.toml
#   make types       mypy
#   make bench       the CPU benchmark matrix -> build/bench-cpu.jsonl, build/bench-cpu.png
#   make bench-gpu   the GPU benchmark matrix -> build/bench-gpu.jsonl, build/bench-gpu.png
#   make clean       removes build/ and the tools' caches, not .venv
#
# Variables:
#   PYTHON=python3.12   the interpreter that makes .venv (3.10 or newer)
#   VENV=none           install nothing, run PYTHON as it is: for a machine that has torch, transformers and rich
#                       already and no network (a GPU image, say):  make demo PYTHON=python3 VENV=none
#   TORCH="..."         what `pip install` gets for PyTorch on a machine without a GPU. Where the package index serves
#                       only the CUDA build, point this at PyTorch's CPU wheels: TORCH="torch==2.13.0 --index-url URL"
#   ARGS="..."          further arguments of the demo, of pytest, or of the benchmark: make demo ARGS=--help

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=

TREE := build/tree
export TRANSFORMERS_VERBOSITY ?= error
export TOKENIZERS_PARALLELISM ?= false

ifeq ($(VENV),none)
# Without the safe path `python -m` would find ./lz_compile, which lacks the folders beside it.
RUN   := PYTHONSAFEPATH=1 PYTHONPATH=$(TREE):. $(PYTHON)
READY := stage
SPLIT :=
else
RUN   := $(VENV)/bin/python
READY := $(VENV)/.ready
SPLIT := -n 2
endif

.PHONY: demo test test-slow mutate lint types bench bench-gpu clean stage

demo: $(READY)
	$(RUN) examples/generate_llama.py $(ARGS)

test: $(READY)
	$(RUN) -m pytest -q $(SPLIT) -m "not gpu and not slow" $(ARGS)

test-slow: $(READY)
	$(RUN) -m pytest -q -m "gpu or slow" $(ARGS)

mutate: $(READY)
	$(RUN) tests/mutation.py trace
	$(RUN) tests/mutation.py run $(ARGS)

lint: $(READY) stage
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	cd $(TREE) && $(abspath $(VENV))/bin/lint-imports --config ../../pyproject.toml

types: $(READY) stage
	MYPYPATH=$(TREE) $(RUN) -m mypy -p lz_compile
	$(RUN) -m mypy --follow-imports=silent benchmarks/models.py examples

bench: $(READY)
	mkdir -p build
	$(RUN) -m benchmarks.models --matrix cpu --json build/bench-cpu.jsonl --plot build/bench-cpu.png $(ARGS)

bench-gpu: $(READY)
	mkdir -p build
	$(RUN) -m benchmarks.models --matrix h200 --json build/bench-gpu.jsonl --plot build/bench-gpu.png $(ARGS)

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The folders lz_compile/, patterns/ and lowering/ install as one package (setuptools package-dir), which tools that read
# files in place can't see; and with VENV=none nothing is installed. A copy in the installed shape serves both; its
# .dist-info carries the entry point by which torch.compile finds the backend.
stage:
	@rm -rf $(TREE)
	@mkdir -p $(TREE)/lz_compile-0.dist-info
	@cp -r lz_compile $(TREE)/lz_compile
	@cp -r patterns $(TREE)/lz_compile/patterns
	@cp -r lowering $(TREE)/lz_compile/lowering
	@printf 'Metadata-Version: 2.1\nName: lz-compile\nVersion: 0\n' > $(TREE)/lz_compile-0.dist-info/METADATA
	@printf '[torch_dynamo_backends]\nlayerzero = lz_compile.backend:layerzero\n' > $(TREE)/lz_compile-0.dist-info/entry_points.txt

# Without a GPU, PyTorch goes in first and pinned, so that resolving the rest can't replace it with a CUDA build of gigabytes.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	nvidia-smi -L >/dev/null 2>&1 || .venv/bin/python -m pip install --quiet $(TORCH)
	.venv/bin/python -m pip install --quiet -e ".[dev]"
	touch $@
