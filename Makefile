# Two commands on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# A file of tests at a time for each of up to four cores. One process, which a debugger needs: make test ARGS=-n0
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
CHECKPOINT ?= models/rdt-small/best_model.pt
DATA ?= wikitext-2
RESOLUTION ?= lowest-direct

# An environment that was moved or copied: its scripts name an interpreter that is elsewhere. What needs it makes it anew.
# Where it is a link, what it leads to stays.
HERE := $(if $(filter /%,$(BIN)),,$(CURDIR)/)$(BIN)/
ifneq ($(wildcard $(BIN)),)
ifneq ($(shell $(BIN)/python -c 1 2>&1 && { [ ! -e $(BIN)/pip ] || grep -qF "$(HERE)" $(BIN)/pip; } && echo runs),runs)
ANEW := $(BIN)/pip
endif
endif

.PHONY: help serve test test-all test-versions lint format proto docs train evaluate with-text bench up check-deploy clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## */\t/' | expand -t 14

serve: $(VENV)/service  ## install what serving needs, start the server on the bundled model
	$(BIN)/rdt-serve --checkpoint "$(CHECKPOINT)"

test: $(VENV)/all  ## run the tests
	$(PYTEST) $(ARGS)

test-all: $(VENV)/all  ## with the slow ones: processes that die, a Ray cluster that grows and shrinks
	$(PYTEST) -m "not gpu" $(ARGS)

test-versions: BIN = .venv-versions/bin
test-versions:  ## with the oldest versions that pyproject.toml admits; RESOLUTION=highest: with the newest (wants uv)
	uv venv -q --clear --python $(PYTHON) .venv-versions
	uv pip install -q --python .venv-versions --resolution $(RESOLUTION) -e '.[service,otel,ray,training,dev]'
	$(PYTEST) -W ignore::DeprecationWarning $(ARGS)  # old libraries use what newer ones below them will drop

lint: $(VENV)/all  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/all  ## bring the code into its style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/all  ## generate the gRPC code from proto/
	$(BIN)/python proto/generate.py

docs: $(VENV)/all  ## generate the tables of docs/operations.md
	PYTHONPATH=. $(BIN)/python docs/generate.py

train: $(VENV)/all  ## train a tiny model: make train DATA=text.txt
	$(BIN)/python -m training --config training/configs/tiny.yaml "data.dataset_name=$(DATA)" $(ARGS)

evaluate: with-text $(VENV)/all  ## evaluate a checkpoint: make evaluate TEXT=text.txt
	$(BIN)/python -m training.evaluate --checkpoint "$(CHECKPOINT)" --text "$(TEXT)" $(ARGS)

with-text:
	$(if $(TEXT),,$(error TEXT is not set: want make evaluate TEXT=text.txt))@:

bench: $(VENV)/all  ## the engine against a plain loop and static batches: make bench ARGS="--model base"
	$(BIN)/python -m benchmarks.engine $(ARGS)

up:  ## the server, Prometheus and Grafana in containers
	docker compose up --build --detach --wait

check-deploy:  ## prove the containers: load, restart, kill, train, reload
	deploy/check.sh

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) .venv-versions .venv-peers build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: $(ANEW)
$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(if $(ANEW),[ ! -L $(VENV) ] || rm $(VENV))
	$(PYTHON) -m venv $(if $(ANEW),--clear )$(VENV)

# Stamps: installed again when what is asked for changes.
$(VENV)/service: pyproject.toml constraints.txt $(ANEW) | $(BIN)/pip
	$(PIP) -e '.[service]'
	touch $@

$(VENV)/all: pyproject.toml constraints.txt $(ANEW) | $(BIN)/pip
	$(PIP) -e '.[service,otel,ray,training,dev]'
	touch $@ $(VENV)/service
