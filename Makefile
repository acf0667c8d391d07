# make demo · make test · make lint · make test-plugin P=llama · make test-isolated P=llama · make bench
PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(sort $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
STAMP := .venv/.installed
EXTRAS := .venv/.extras
PLUGGY_OLD := .cache/pluggy-1.6
P ?= llama
export TOKENIZERS_PARALLELISM := false
# Threads that spin while they wait starve each other on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install extras demo test lint format test-plugin test-isolated test-scaffold gpu-test bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## create .venv with the core, every plugin and the test tools

$(STAMP): pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PLUGINS))
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]" $(addprefix -e ./,$(PLUGINS))
	touch $@

extras: $(EXTRAS)  ## also what else reads or runs our results, else its tests are skipped: Ray, lm-eval, llama.cpp (compiled)

$(EXTRAS): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[eval,ray]" llama-cpp-python
	touch $@

$(PLUGGY_OLD): $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $@ pluggy==1.6.0
	touch $@

demo: $(STAMP)  ## quantize the small model in examples/pycoder and compare it with the original
	$(BIN)/awq demo

# Tiny matrices gain nothing from threads.
test test-plugin test-isolated: export OMP_NUM_THREADS := 1

test: $(STAMP) $(PLUGGY_OLD)  ## all tests; the hook tests once more on the oldest pluggy
	PYTHONPATH=$(PLUGGY_OLD) $(BIN)/python -m pytest -q -p no:cacheprovider tests/hooks
	$(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --allow-untyped-defs $(wildcard plugins/*/awq_plugin_*)

format: $(STAMP)  ## rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-plugin: $(STAMP)  ## the tests of one plugin: make test-plugin P=llama
	$(BIN)/python -m pytest -q plugins/$(P)

test-isolated:  ## one plugin's tests against built wheels in an empty environment: make test-isolated P=llama
	rm -rf .cache/isolated && mkdir -p .cache/isolated
	$(PYTHON) -m venv .cache/isolated/env
	.cache/isolated/env/bin/python -m pip install -q --upgrade pip
	.cache/isolated/env/bin/python -m pip wheel -q --no-deps -w .cache/isolated/dist . $(addprefix ./,$(PLUGINS))
	.cache/isolated/env/bin/python -m pip install -q -c constraints.txt --find-links .cache/isolated/dist "awq-plugin-$(P)[test]"
	.cache/isolated/env/bin/python -m pytest -q plugins/$(P)

test-scaffold: $(STAMP)  ## `awq plugins new` for three unlike models, each tested from its wheel in an empty environment
	rm -rf .cache/scaffold && mkdir -p .cache/scaffold
	$(PYTHON) -m venv .cache/scaffold/env
	.cache/scaffold/env/bin/python -m pip install -q --upgrade pip
	for kind in opt phi mixtral; do \
	  mkdir -p .cache/scaffold/$$kind && printf '{"model_type": "%s"}' $$kind > .cache/scaffold/$$kind/config.json && \
	  AWQ_PLUGINS= $(BIN)/awq plugins new new_$$kind --from-model .cache/scaffold/$$kind --out .cache/scaffold/new_$$kind || exit 1; \
	done
	.cache/scaffold/env/bin/python -m pip wheel -q --no-deps -w .cache/scaffold/dist . .cache/scaffold/new_*
	.cache/scaffold/env/bin/python -m pip install -q -c constraints.txt pytest .cache/scaffold/dist/*.whl
	cd .cache/scaffold && AWQ_STRICT_PLUGINS=1 env/bin/python -m pytest -q --import-mode=importlib new_*/tests

gpu-test: $(STAMP)  ## the kernels on a real GPU
	$(BIN)/python -m pytest -q -m gpu tests/kernels

bench: $(STAMP)  ## benchmarks that fit a small machine
	$(BIN)/python benchmarks/quantize.py

clean:  ## remove environments, caches and demo output
	rm -rf .venv .cache demo-output
