# Everything a newcomer needs: `make demo` and `make test`. Both make their own environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := .demo

.PHONY: demo test quick lint clean

# An environment is rebuilt when pyproject.toml changes.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.ready
	mkdir -p $(DEMO)
	$(BIN)/randsurgery popup resnet50 --k 0.3 --init signed-constant --output $(DEMO)/resnet50.safetensors --force
	$(BIN)/randsurgery inspect verify $(DEMO)/resnet50.safetensors
	$(BIN)/randsurgery eval $(DEMO)/resnet50.safetensors
	$(BIN)/randsurgery inspect storage $(DEMO)/resnet50.safetensors

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

# As many processes as there are cores, of one thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# What a working day needs: under a minute on two cores.
quick: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

clean:
	rm -rf $(VENV) $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis
