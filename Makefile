# `make help` lists the targets. Everything runs from .venv, which `make setup` makes from requirements.lock.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
UV ?= uv
# Test files run side by side; 0: one after the other, in one process.
TEST_PROCESSES ?= 3
PARALLEL := -n $(TEST_PROCESSES) --dist loadfile
# More words for pytest, the demo or the server: make test ARGS="-k files", make demo ARGS=--crash
ARGS ?=

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

.PHONY: environment
environment: ## Virtual environment from the lock (seconds when it is up to date)
	@scripts/setup environment

.PHONY: setup
setup: ## Everything a fresh machine needs: environment, Docker engine, sandbox image
	@scripts/setup

.PHONY: image-full
image-full: setup ## The sandbox image with all languages, documents and a browser (10 minutes and more; 6 GB)
	$(PY) -m managed_agents.sandbox.image build --variant full $(ARGS)

.PHONY: clients
clients: environment ## Other SDKs that the tests drive: an older Python release, TypeScript
	@scripts/setup clients

.PHONY: check
check: environment ## Format, lint, types, import contracts, migrations against tables, generated pages
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/basedpyright src
	.venv/bin/lint-imports
	$(PY) scripts/alembic_check.py
	$(PY) scripts/generate_docs.py --check

.PHONY: format
format: environment ## Format and fix what can be fixed by itself
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.PHONY: test
test: setup clients check ## All checks and tests, at most 20 minutes
	@mkdir -p .state
	$(PYTEST) $(PARALLEL) -m "not full" --junitxml=.state/tests.xml $(ARGS)

.PHONY: test-full
test-full: setup clients check ## `test` and what takes long
	@mkdir -p .state
	$(PYTEST) $(PARALLEL) --junitxml=.state/tests-full.xml $(ARGS)

.PHONY: test-crash
test-crash: setup ## Only the tests that kill processes
	$(PYTEST) $(PARALLEL) tests/crash $(ARGS)

.PHONY: bench
bench: setup ## Speed against the targets, as ratios to baselines of the same run
	$(PY) -m tests.bench $(ARGS)

.PHONY: demo
demo: setup ## An agent audits a project's dependencies in a real container (ARGS=--crash kills its worker)
	.venv/bin/managed-agents demo $(ARGS)

.PHONY: serve
serve: setup ## The whole server on this machine; Ctrl-C stops it
	.venv/bin/managed-agents up $(ARGS)

.PHONY: migrate
migrate: environment ## Bring the database in MANAGED_AGENTS_DATABASE_URL to this version
	.venv/bin/managed-agents migrate $(ARGS)

.PHONY: docs
docs: environment ## Write the generated parts of the documentation again
	$(PY) scripts/generate_docs.py

.PHONY: lock
lock: ## Resolve the dependencies again (needs uv)
	$(UV) pip compile pyproject.toml --extra embedded --group dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements.lock

.PHONY: clean
clean: ## Remove what was generated here; data directories and images stay
	rm -rf .venv dist .state .bench .hypothesis .ruff_cache .import_linter_cache
	find src tests migrations scripts -name __pycache__ -type d -prune -exec rm -rf {} +
