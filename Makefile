# make demo   set up, then train and compare both methods on the ORL faces
# make test   set up, then run the whole test suite
# make docs   set up, then build the documentation in build/site
# make package   source archive -> wheel -> an environment of its own with the oldest PyTorch; try what was installed, then the slow tests
# make sanitize   set up, then run the tests of the C++ code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (needs gcc's)
# make fuzz   set up, then set every backend and instruction set beside the reference, 2,000 random problems each
#
# TORCH=torch==2.13.0   another PyTorch      PYTHON=python3.12   another Python      VENV=.venv   another place      JOBS=2   processes that run tests
# TESTS="-m slow"   only these tests
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TORCH ?= torch
BIN = $(VENV)/bin
SOURCES = setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test docs package fuzz sanitize sanitize-address sanitize-thread lint clean

demo: $(VENV)/.ready
	$(BIN)/sst-fast demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The archive's wheel, in an environment that has seen no checkout, with the oldest PyTorch that is supported. The tests of the archive
# run without the archive's own package, so that they import what is installed.
PACKAGE = build/package
NEW = $(abspath $(PACKAGE))/venv
PACKAGED = setup.py pyproject.toml MANIFEST.in README.md $(shell find csrc sst_fast kernels tests bench examples docs -type f \
	  -not -name '*.so' -not -path '*/__pycache__/*')
package: $(PACKAGE)/.installed
	cd $(PACKAGE) && $(NEW)/bin/sst-fast --version && $(NEW)/bin/python archive/tests/smoke.py
	cd $(PACKAGE)/archive && $(NEW)/bin/python -m pytest -q tests/test_docs.py tests/test_queue.py
	cd $(PACKAGE)/archive && $(NEW)/bin/python -m pytest -n $(JOBS) --dist worksteal -m slow

$(PACKAGE)/.installed: $(NEW)/.torch $(PACKAGED)
	rm -rf $(PACKAGE)/archive $(PACKAGE)/*.tar.gz $(PACKAGE)/*.whl && mkdir -p $(PACKAGE)/archive
	$(NEW)/bin/python setup.py -q egg_info --egg-base $(PACKAGE) sdist --dist-dir $(PACKAGE)
	SST_FAST_SKIP_CUDA=1 SST_FAST_FORCE_CUDA=0 SST_FAST_REQUIRE_EXTENSION=1 \
	  $(NEW)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(PACKAGE) $(PACKAGE)/*.tar.gz
	$(NEW)/bin/python -m pip install --quiet --force-reinstall --no-deps $(PACKAGE)/*.whl
	$(NEW)/bin/python -m pip install --quiet "sst-fast[test]"
	tar xzf $(PACKAGE)/*.tar.gz --strip-components 1 -C $(PACKAGE)/archive && rm -r $(PACKAGE)/archive/sst_fast
	touch $@

$(NEW)/.torch: override TORCH = torch==$(shell sed -n 's/^requires.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml).*

# Every instruction set that this machine has; those that it has not are skipped.
FUZZ = $(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz
fuzz: $(VENV)/.ready
	$(FUZZ) -n $(JOBS) -k "not (loss and cpu)"
	printf '%s\n' generic avx2 avx512 avx512bf16 | xargs -P $(JOBS) -I SET env SST_FAST_CPU=SET $(FUZZ) -k "loss and cpu"

# The package with an instrumented extension lies in build/; Python itself is not instrumented, hence LD_PRELOAD. PyTorch is not either: one
# thread is its share under ThreadSanitizer, and csrc/cpu/parallel.h makes ours.
# A comma that is none of call's.
, = ,
LIBRARY = $(shell $(or $(CXX),g++) -print-file-name=$(1))
INSTRUMENTED = SST_FAST_SKIP_CUDA=1 SST_FAST_FORCE_CUDA=0 SST_FAST_REQUIRE_EXTENSION=1 SST_FAST_SANITIZE=$(1) LDFLAGS=-fsanitize=$(1) \
	  $(BIN)/python setup.py -q build --build-base build/$(2) --build-lib build/$(2)/lib
OF_C = $(BIN)/python -m pytest -s -o pythonpath=build/$(1)/lib -p no:cacheprovider --hypothesis-profile=few -m "not slow" $(2) \
	  -k "not triton and not interpreter and not reference and not compile"

sanitize: sanitize-address sanitize-thread

sanitize-address: $(VENV)/.ready
	$(call INSTRUMENTED,address$(,)undefined,address)
	LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libubsan.so) $(call LIBRARY,libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=build/address/lib \
	  $(call OF_C,address,tests/test_fuzz.py tests/test_operators.py tests/test_queue.py)

sanitize-thread: $(VENV)/.ready
	$(call INSTRUMENTED,thread,thread)
	LD_PRELOAD="$(call LIBRARY,libtsan.so) $(call LIBRARY,libstdc++.so)" OMP_NUM_THREADS=1 \
	  TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 PYTHONPATH=build/thread/lib \
	  $(call OF_C,thread,tests/test_fuzz.py tests/test_operators.py tests/test_queue.py)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

%/.torch:
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip setuptools wheel ninja pybind11 numpy
	$*/bin/python -c "import torch" 2>/dev/null || $*/bin/python -m pip install "$(TORCH)"
	touch $@

# The extension is built against the torch of this environment, hence no build isolation.
$(VENV)/.ready: $(VENV)/.torch $(SOURCES)
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
