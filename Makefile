PYTHON ?= python3
# options for the install of torch, such as TORCH='--index-url https://download.pytorch.org/whl/cpu'
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin

# releases of diffusers, each with the transformers and peft of its time
MATRIX := 0.32.2/4.48.3/0.14.0 0.35.2/4.57.1/0.17.1 0.38.0/4.57.1/0.17.1

.PHONY: demo test test-matrix bench gpu sanitize clean

demo: $(VENV)/installed
	$(BIN)/trace-fast demo -o demo

test: $(VENV)/installed
	$(BIN)/python -m pytest tests

# capture on older releases, each in an environment of its own; `make test` runs the latest
test-matrix: $(VENV)/installed
	set -e; for release in $(MATRIX); do \
	  set -- $$(echo $$release | tr / ' '); folder=build/matrix-$$1; echo "== diffusers $$1"; \
	  $(PYTHON) -m venv $$folder; \
	  $$folder/bin/pip install -q $(TORCH) torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])') \
	    diffusers==$$1 transformers==$$2 peft==$$3 triton pytest tqdm typer setuptools pybind11 ninja; \
	  $$folder/bin/pip install -q --no-deps --no-build-isolation .; \
	  $$folder/bin/python -m pytest -q -p no:cacheprovider tests/test_backbones.py tests/test_conditioning.py; \
	done

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/gpu.sh kernels
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/gpu.sh backbones

sanitize: $(VENV)/installed
	TRACE_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize
	for threads in 1 2; do \
	  OMP_NUM_THREADS=$$threads PYTHONPATH=build/sanitize ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  $(BIN)/pytest tests/test_attention.py tests/test_readout.py tests/test_divergence.py tests/test_contours.py tests/test_regions.py \
	    -x -s -k '(native or contours) and not large' || exit 1; \
	done

# timm without its torchvision: the registry has that for CUDA alone, and beside another torch it cannot be imported
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt $(TORCH) torch
	$(BIN)/pip install -c constraints.txt -e '.[demo,test]'
	$(BIN)/pip install -c constraints.txt --no-deps timm
	touch $@

clean:
	rm -rf build demo dist $(VENV) *.egg-info trace_fast/_C*.so
