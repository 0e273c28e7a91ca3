# make test    set up .venv if need be, then lint, types and all tests
# make demo    set up .venv if need be, then both examples
# make grid    every number of shards on every number of ranks (1 to 8), about two minutes
# make fuzz    hostile files, tokenizers and calls at random, half an hour; MINUTES=5 make fuzz for less
# make supply  all tests on the lowest versions that setup.py allows and on the highest there are; installs both in build/
# make bench   this library beside transformers and llama.cpp, about a quarter of an hour; installs all peers
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test demo grid fuzz supply bench

setup: .venv/installed

.venv/installed: requirements.txt setup.py $(wildcard llama/kernels/csrc/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -e '.[dev]'
	touch $@

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

demo: setup
	$(BIN)/python example_text_completion.py
	$(BIN)/python example_chat_completion.py

grid: setup
	$(BIN)/python -m pytest -m "grid or not grid" tests/test_ranks.py -rP

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),30)

supply:
	PYTHON=$(PYTHON) tests/supply.sh lowest
	PYTHON=$(PYTHON) tests/supply.sh highest

bench: setup
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/speed.py
