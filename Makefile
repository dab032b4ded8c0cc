# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread each: the tests run in several processes.
export OMP_NUM_THREADS ?= 1

# The floor of pyproject.toml, one between and the newest; one environment each, of several gigabytes.
TORCHES ?= 2.8.0 2.10.0 2.14.1
MATRIX ?= .matrix

.PHONY: all setup demo docs test lint unit bench matrix clean

all: test

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $@

demo: setup
	OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/anyattn demo --out demo-output

test: lint unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The documentation as a site, at a local address.
docs: setup
	$(BIN)/mkdocs serve

bench: setup
	$(BIN)/python benchmarks/overhead.py

# Not part of `test`: the suite on each version of torch, the counts at the end of each; `-` goes on after a failure.
matrix: $(addprefix matrix-,$(TORCHES))

matrix-%: $(MATRIX)/%/.done
	-$(MATRIX)/$*/bin/python -m pytest -q -n 2 --dist loadfile > $(MATRIX)/$*/report.txt 2>&1
	@echo "torch $*: $$(tail -n 1 $(MATRIX)/$*/report.txt)  ($(MATRIX)/$*/report.txt)"

$(MATRIX)/%/.done: pyproject.toml
	$(PYTHON) -m venv $(MATRIX)/$*
	$(MATRIX)/$*/bin/python -m pip install --quiet torch==$*
	$(MATRIX)/$*/bin/python -m pip install --quiet --editable ".[all]" pytest-xdist hatchling torch==$*
	touch $@

.PRECIOUS: $(MATRIX)/%/.done

clean:
	rm -rf $(VENV) $(MATRIX) demo-output
