PYTHON ?= python3
# options for the install of torch, such as TORCH='--index-url https://download.pytorch.org/whl/cpu'
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench gpu sanitize clean

demo: $(VENV)/installed
	$(BIN)/trace-fast demo -o demo

test: $(VENV)/installed
	$(BIN)/python -m pytest tests

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" benchmarks/gpu.sh

sanitize: $(VENV)/installed
	TRACE_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize
	for threads in 1 2; do \
	  OMP_NUM_THREADS=$$threads PYTHONPATH=build/sanitize ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  $(BIN)/pytest tests/test_attention.py tests/test_readout.py tests/test_divergence.py -x -s -k 'native and not large' || exit 1; \
	done

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt $(TORCH) torch
	$(BIN)/pip install -c constraints.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf build demo dist $(VENV) *.egg-info trace_fast/_C*.so
