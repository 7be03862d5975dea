# make demo and make test do all of the set-up themselves: see docs/install.md.
SHELL := /bin/bash
VENV ?= .venv
DOCS_VENV ?= .venv-docs
CONSTRAINTS ?= constraints.txt
PYTHON_IN_VENV := $(VENV)/bin/python
PINS := pyproject.toml $(CONSTRAINTS) tools/setup
DEMO_READY := $(VENV)/.ready-demo
DEV_READY := $(VENV)/.ready-dev
DOCS_READY := $(DOCS_VENV)/.ready-docs

# make demo DEMO_ARGS=--short      make test TEST_ARGS="-k checkpoint"
# make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt      the oldest versions that work
DEMO_ARGS ?=
TEST_ARGS ?=
WORKERS ?= logical

.DEFAULT_GOAL := help
.PHONY: help demo test quick check lint format types docs dist setup clean

help: ## This list.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(DEMO_READY) ## EfficientNet-Lite0 learns Fashion-MNIST inside a memory budget (DEMO_ARGS=--short: one minute).
	$(VENV)/bin/trady demo $(DEMO_ARGS)

# Each worker begins with files of its own, so that what a file computes once is computed once; then they share.
PYTEST = OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -n $(WORKERS) --maxprocesses=8 --dist=worksteal

test: $(DEV_READY) ## All tests.
	$(PYTEST) $(TEST_ARGS)

quick: $(DEV_READY) ## Some tests of every package, in about a minute (tests/quick.py).
	$(PYTEST) $$($(PYTHON_IN_VENV) -m tests.quick) $(TEST_ARGS)

check: lint types test docs ## What continuous integration runs: lint, types, tests, docs, a short demo.
	$(MAKE) demo DEMO_ARGS=--short

lint: $(DEV_READY) ## ruff: rules and format; codespell.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell

format: $(DEV_READY) ## ruff: write the format, mend what can be mended.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(DEV_READY) ## mypy, strict, of the tests too.
	$(VENV)/bin/mypy

docs: $(DOCS_READY) ## The documentation as a site, in site/.
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS_VENV)/bin:$$PATH" $(DOCS_VENV)/bin/mkdocs build

setup: $(DEV_READY) ## The virtual environment with everything in it.

dist: ## The source archive and the wheel in dist/, installed into an empty environment and used there.
	CONSTRAINTS=$(CONSTRAINTS) tools/dist

clean: ## Remove virtual environments, caches, site/ and dist/; runs/ stays.
	rm -rf .venv .venv-* site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_READY): $(PINS)
	VENV=$(VENV) CONSTRAINTS=$(CONSTRAINTS) tools/setup demo
	@touch $@

$(DEV_READY): $(PINS)
	VENV=$(VENV) CONSTRAINTS=$(CONSTRAINTS) tools/setup dev
	@touch $@ $(DEMO_READY)

$(DOCS_READY): pyproject.toml constraints.txt tools/setup
	VENV=$(DOCS_VENV) tools/setup docs
	@touch $@
