# make demo   set up, then train and compare both methods on the embedded faces
# make test   set up, then run the whole test suite
# make docs   set up, then build the documentation in build/site
# make package   set up, then source archive -> wheel -> empty environment, and try what was installed
# make sanitize   set up, then run the tests of the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer (needs gcc's)
# make fuzz   set up, then set every backend and instruction set beside the reference, 2,000 random problems each
#
# TORCH=torch==2.13.0   another PyTorch      PYTHON=python3.12   another Python      VENV=.venv   another place      JOBS=2   processes that run tests
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TORCH ?= torch
BIN = $(VENV)/bin
SOURCES = setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test docs package fuzz sanitize lint clean

demo: $(VENV)/.ready
	$(BIN)/sst-fast demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The new environment sees torch, NumPy and pytest of the other one, but not its sst-fast: a folder named in a .pth file is searched,
# .pth files in it are not read. The tests of the archive run without the archive's own package, so that they import what is installed.
PACKAGE = build/package
NEW = $(abspath $(PACKAGE))/venv/bin
package: $(VENV)/.ready
	rm -rf $(PACKAGE) && mkdir -p $(PACKAGE)/archive
	$(BIN)/python setup.py -q sdist --dist-dir $(PACKAGE)
	SST_FAST_SKIP_CUDA=1 SST_FAST_FORCE_CUDA=0 SST_FAST_REQUIRE_EXTENSION=1 \
	  $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(PACKAGE) $(PACKAGE)/*.tar.gz
	$(BIN)/python -m venv --without-pip $(PACKAGE)/venv
	$(BIN)/python -m pip --python $(NEW)/python install --quiet --no-deps --no-index $(PACKAGE)/*.whl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(NEW)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/other.pth
	cd $(PACKAGE) && $(NEW)/sst-fast --version && $(NEW)/python ../../tests/smoke.py
	tar xzf $(PACKAGE)/*.tar.gz --strip-components 1 -C $(PACKAGE)/archive && rm -r $(PACKAGE)/archive/sst_fast
	cd $(PACKAGE)/archive && $(NEW)/python -m pytest -q -p no:cacheprovider --collect-only > collected || { tail collected; exit 1; }
	cd $(PACKAGE)/archive && $(NEW)/python -m pytest -q -p no:cacheprovider tests/test_docs.py tests/test_queue.py

fuzz: $(VENV)/.ready
	$(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz
	for set in generic avx2 avx512; do \
	  SST_FAST_CPU=$$set $(BIN)/python -m pytest tests/test_fuzz.py -k "loss and cpu" --hypothesis-profile=fuzz || exit 1; \
	done

# The package with an instrumented extension lies in build/address; Python itself is not instrumented, hence LD_PRELOAD.
LIBRARY = $(shell $(or $(CXX),g++) -print-file-name=$(1))
sanitize: $(VENV)/.ready
	SST_FAST_SANITIZE=address,undefined LDFLAGS=-fsanitize=address,undefined SST_FAST_SKIP_CUDA=1 SST_FAST_REQUIRE_EXTENSION=1 \
	  $(BIN)/python setup.py -q build --build-base build/address --build-lib build/address/lib
	LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libubsan.so) $(call LIBRARY,libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=build/address/lib \
	  $(BIN)/python -m pytest -o pythonpath=build/address/lib -p no:cacheprovider -m "not slow" tests/test_fuzz.py \
	  tests/test_operators.py tests/test_queue.py -k "not triton and not reference and not compiles"

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

# The package is there already, so these install what the extra asks for and build nothing.
$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet "sst-fast[docs]"
	touch $@

$(VENV)/.lint: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet "sst-fast[lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs sst_fast/*.so
