# `make test` and `make compare` make what they need; PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
# Comparing needs a part of what testing needs; a file for each says what .venv has.
COMPARING := .venv/comparing
INSTALLED := .venv/installed

define install
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$(1)]'
endef

# Both make the same .venv.
.NOTPARALLEL:
.PHONY: venv test lint unit compare docs clean

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(call install,test)
	touch $@ $(COMPARING)

$(COMPARING): pyproject.toml
	$(call install,benchmarks)
	touch $@

test: lint unit

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Neighbours mostly share a process and what takes long to make; ways to group them all hang once a process has died.
unit: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

compare: $(COMPARING)
	$(BIN)/python -m benchmarks compare digits-split digits-permuted

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
