# make demo   set up, then train and compare both methods on the embedded faces
# make test   set up, then run the whole test suite
# make docs   set up, then build the documentation in build/site
# make fuzz   set up, then set every backend and instruction set beside the reference, 2,000 random problems each
#
# TORCH=torch==2.13.0   another PyTorch      PYTHON=python3.12   another Python      VENV=.venv   another place      JOBS=2   processes that run tests
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TORCH ?= torch
BIN = $(VENV)/bin
SOURCES = setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test docs fuzz lint clean

demo: $(VENV)/.ready
	$(BIN)/sst-fast demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: $(VENV)/.ready
	$(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz
	for set in generic avx2 avx512; do \
	  SST_FAST_CPU=$$set $(BIN)/python -m pytest tests/test_fuzz.py -k "loss and cpu" --hypothesis-profile=fuzz || exit 1; \
	done

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

# The extension is built against the torch of this environment, hence no build isolation.
$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja pybind11 numpy
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[docs]"
	touch $@

$(VENV)/.lint: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs sst_fast/*.so
