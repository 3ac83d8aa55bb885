PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench sanitize clean

demo: $(VENV)/installed
	$(BIN)/trace-fast demo -o demo

test: $(VENV)/installed
	$(BIN)/python -m pytest tests

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf build demo dist $(VENV) *.egg-info trace_fast/_C*.so
