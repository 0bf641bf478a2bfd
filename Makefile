# make demo   set up an environment and train the default network        make test   set up and run the tests
# make bench  the core benchmark, on what this machine has               make lint   format and style
# make docs   the documentation, into notebooks/docs/site
PYTHON ?= python3
VENV ?= .venv
# With an NVIDIA driver for CUDA 12 or 13, JAX comes with its GPU packages: the demo and the tests then run fused kernels.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: \(1[23]\)\..*/cuda\1/p')
BIN := $(VENV)/bin
TESTS ?= tests

.PHONY: demo test test-core test-gpu bench bench-compare report docs lint clean

demo: $(VENV)/train
	$(BIN)/python experiments/train.py

# XLA for CPU compiles the tests more than twice as fast without its optimisations.
# They are for a CPU, also where there is a GPU, which `make test-gpu` is for.
test test-core: export JAX_PLATFORMS := cpu
test test-core: export XLA_FLAGS := $(XLA_FLAGS) --xla_backend_optimization_level=0
test: $(VENV)/dev
	$(BIN)/python -m pytest $(TESTS) -n auto -m "not gpu"

test-core: $(VENV)/dev
	$(BIN)/python -m pytest tests/test_core.py tests/test_ops_*.py tests/test_nn.py tests/test_golden.py -n auto -m "not gpu"

test-gpu: $(VENV)/dev
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest $(TESTS) -n 8 -m gpu

bench: $(VENV)/dev
	$(BIN)/python benchmarks/core.py

bench-compare: $(VENV)/dev
	$(BIN)/python benchmarks/compare.py $(A) $(B)

report: $(VENV)/dev
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/figures.py

# the pages, in notebooks/docs/site
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file notebooks/docs/mkdocs.yml

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)

# One stamp for each set of packages; `pip install -e` leaves the checkout itself importable.
comma := ,
$(VENV)/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*$(addprefix $(comma),$(CUDA))]"
	touch $@
