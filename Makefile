# `make demo` and `make test` need Python 3.11 or newer, a C compiler and make; the rest they install into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: help install demo test lint clean

help:
	@echo "make demo    install into $(VENV), train a MoE and its Engram twin, write runs/demo/report.html"
	@echo "make test    install into $(VENV), lint, check types, run the tests"
	@echo "make lint    lint and types only"
	@echo "make clean   remove $(VENV) and runs/"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing engram-lm and its tools into $(VENV) (about 1.3 GB, a few minutes)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt torch
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,fast,dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	@echo "training a MoE and its Engram twin on WordNet, then writing runs/demo/report.html"
	$(RUN)/engram demo

test: lint
	@echo "running the tests"
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED)
	@echo "checking style and types"
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

clean:
	rm -rf $(VENV) runs
