# make test    create .venv if needed, then run the linter, the type checker and all tests
# make demo    create .venv if needed, then run both example scripts with the demo model
# make grid    test every number of shards on every number of ranks (1 to 8); takes about two minutes
# make fuzz    test random invalid files, tokenizers and calls for half an hour; MINUTES=5 make fuzz for five minutes
# make supply  run all tests with the lowest versions that setup.py allows and with the newest; installs both in build/
# make bench   compare this library with transformers and llama.cpp, for about a quarter of an hour; installs all peers
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
