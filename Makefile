# make demo        set up an environment and train the default network
# make test        set up and run all tests; CONTRIBUTING.md says how long it takes; `make test TESTS=tests/test_core.py` runs a part
# make test-fast   the tests of core, ops and nn on small shapes
# make fuzz        many random calls of every public function, 15 minutes; FUZZ=100 for fewer
# make test-gpu    the tests that need a GPU
# make lint        style and format; `ruff format .` mends the format
# make bench       the core benchmark; it needs a GPU
# make docs        the documentation; it says where the pages are
PYTHON ?= python3
VENV ?= .venv
# Where there is an NVIDIA driver for CUDA 12 or 13, JAX is installed with its GPU packages, and the demo runs the fused kernels.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: \(1[23]\)\..*/cuda\1/p')
BIN := $(VENV)/bin
TESTS ?= tests
WORKERS := -n auto --dist worksteal # the tests of a file mostly run in one process, which compiles what they share once
FAST := core ops_contract ops_errors ops_implementations ops_packing nn # the tests of kernels and transforms take longer

.PHONY: demo test test-fast fuzz test-gpu bench bench-compare report docs lint clean

demo: $(VENV)/train
	$(BIN)/python experiments/train.py

# These tests run on the CPU, also on a machine with a GPU; tests/conftest.py makes XLA compile faster there.
test test-fast fuzz: export JAX_PLATFORMS := cpu
test: $(VENV)/dev
	$(BIN)/python -m pytest $(TESTS) $(WORKERS) -m "not gpu"

test-fast: $(VENV)/dev
	$(BIN)/python -m pytest $(FAST:%=tests/test_%.py) $(WORKERS) -m "not gpu"

fuzz: export SNNFUSE_FUZZ := $(or $(FUZZ),1000)
fuzz: $(VENV)/dev
	$(BIN)/python -m pytest tests/test_fuzz.py $(WORKERS)

test-gpu: $(VENV)/dev
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest $(TESTS) -n 8 -m gpu

bench: $(VENV)/dev
	$(BIN)/python benchmarks/core.py

bench-compare: $(VENV)/dev
	$(BIN)/python benchmarks/compare.py $(A) $(B)

report: $(VENV)/dev
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/figures.py

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file notebooks/docs/mkdocs.yml
	@echo "Open $(CURDIR)/notebooks/docs/site/index.html in a browser"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)

# One stamp file for each set of packages. `pip install -e` makes the checkout itself importable.
comma := ,
$(VENV)/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*$(addprefix $(comma),$(CUDA))]"
	touch $@
