PYTHON ?= python3
# options for the install of torch, such as TORCH='--index-url https://download.pytorch.org/whl/cpu'
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
# two processes, one thread each (tests/conftest.py)
PARALLEL := -n 2
MINUTES := 10
POINTS := 300
# disks that are full or read-only are mounted, which takes the rights of root
DISKS := $(if $(filter 0,$(shell id -u)),,--no-disks)

# releases of diffusers, each with the transformers and peft of its time
MATRIX := 0.32.2/4.48.3/0.14.0 0.35.2/4.57.1/0.17.1 0.38.0/4.57.1/0.17.1

.DEFAULT_GOAL := help
.PHONY: help demo build lint test-fast test docs test-robust test-matrix fuzz kill bench gpu sanitize sanitize-threads clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: build ## write the edges of sample photographs to demo/
	$(BIN)/trace-fast demo -o demo

build: $(VENV)/installed ## compile what changed in csrc/, in seconds; the environment is made once
	$(BIN)/python setup.py -q build_ext --inplace

lint: build ## check format, types, stubs and words; change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest trace_fast._C --mypy-config-file scripts/stubtest.ini
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/python scripts/terms.py

test-fast: build ## run the tests that are not slow, in about a minute
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow" tests

test: build ## run all tests
	$(BIN)/python -m pytest -q $(PARALLEL) tests

docs: build ## write the documentation to build/site; a warning is an error
	$(BIN)/python scripts/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-robust: build ## run the numeric tests with other last bits, instruction sets and numbers of threads
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/robust.sh $(PARALLEL)

# capture on older releases, each in an environment apart; `make test` runs the latest
test-matrix: build ## run the tests of capture with older releases of diffusers
	set -e; for release in $(MATRIX); do \
	  set -- $$(echo $$release | tr / ' '); folder=build/matrix-$$1; echo "== diffusers $$1"; \
	  $(PYTHON) -m venv $$folder; \
	  $$folder/bin/pip install -q $(TORCH) torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])') \
	    diffusers==$$1 transformers==$$2 peft==$$3 triton pytest tqdm typer setuptools pybind11 ninja; \
	  $$folder/bin/pip install -q --no-deps --no-build-isolation .; \
	  $$folder/bin/python -m pytest -q -p no:cacheprovider tests/test_backbones.py tests/test_conditioning.py; \
	done

fuzz: build ## give hostile inputs to the package for MINUTES=10, and count what becomes of them
	$(BIN)/python tests/fuzz/run.py --minutes $(MINUTES)

kill: build ## kill POINTS=300 runs of commands at random moments, run them again and compare; root can fill disks, too
	$(BIN)/python tests/fuzz/kill.py --points $(POINTS) $(DISKS)

bench: build ## run the benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu: build ## test, tune and measure on the GPU at hand
	set -e; export PATH="$(CURDIR)/$(BIN):$$PATH"; for stage in check time kernels backbones; do scripts/gpu.sh $$stage; done

sanitize: build ## run the native core with the address and undefined-behavior sanitizers: its tests, and hostile inputs
	TRACE_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize
	export PYTHONPATH=build/sanitize ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)"; \
	for threads in 1 2; do \
	  OMP_NUM_THREADS=$$threads $(BIN)/pytest \
	    tests/test_attention.py tests/test_attend.py tests/test_readout.py tests/test_divergence.py tests/test_contours.py \
	    tests/test_hierarchy.py tests/test_regions.py \
	    -x -s -k '(native or contours or attend or hierarchy) and not large' || exit 1; \
	done; \
	$(BIN)/python tests/fuzz/run.py --target ops --inputs 1000 --seed 0

sanitize-threads: ## run the bodies of the GPU kernels in threads on the CPU, with the sanitizer of data races
	mkdir -p build
	c++ -std=c++17 -O1 -g -fsanitize=thread tests/regions_threads.cpp -o build/regions_threads
	build/regions_threads

clean: ## remove what was made: environment, builds, demo
	rm -rf build demo dist $(VENV) *.egg-info trace_fast/_C*.so

# torch without its dependencies, which an index of torch alone has in other versions: the next installs bring them. timm
# without its torchvision: the registry has that for CUDA alone, and beside another torch it cannot be imported
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt --no-deps $(TORCH) torch
	$(BIN)/pip install -c constraints.txt setuptools pybind11 ninja
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[test]'
	$(BIN)/pip install -c constraints.txt --no-deps timm
	touch $@
