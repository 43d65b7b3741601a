SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# First on PATH: Ray starts its own processes by name, and they must come from this environment.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export RAY_USAGE_STATS_ENABLED := 0
unexport PYTHONPATH VIRTUAL_ENV

.PHONY: help demo test coverage lint audit hooks fuzz format bench-spine bench-serve bench-faults bench-realtime bench-online bench-cold-start bench-quality bench-training bench-families bench-house bench-front peers constraints wheel clean same-behaviour schemas

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

# The environment is installed once and again only when what it is made from changes.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "recsys-ray needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

.venv/.installed-demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv, about 2.5 GB: this takes some minutes"
	python -m pip install --quiet -c constraints.txt -e '.[cpu,demo]'
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv, about 2.5 GB: this takes some minutes"
	python -m pip install --quiet -c constraints.txt -e '.[cpu,demo,dev]'
	touch .venv/.installed-demo $@

# The tests' Redis: the machine's, or else Debian's package redis-tools. Its redis-check-rdb is the server under another
# name; all that Debian's package redis-server adds is a link to it and a service that would run from then on.
.venv/bin/redis-server: | .venv/bin/python
	@as_root=env; [ "$$(id -u)" = 0 ] || as_root='sudo -n env'; \
	command -v redis-server redis-check-rdb > /dev/null || { \
	  $$as_root apt-get update -qq && \
	  $$as_root DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends redis-tools; \
	} || { echo 'The tests need redis-server on PATH: install it (Debian: apt-get install redis-tools),' \
	  'or leave out the tests of the event store in Redis: make test REDIS=0' >&2; exit 1; }
	ln -sf "$$(command -v redis-server redis-check-rdb | head -n 1)" $@
	@$@ --version

demo: .venv/.installed-demo  ## train on MovieLens-small and recommend over HTTP (ONCE=1: stop after the first answer)
	python -m jobs.demo $(if $(filter-out 0,$(ONCE)),--once)

PYTEST := pytest -m 'not slow and not benchmark' $(if $(filter 0,$(REDIS)),-k 'not redis')
FAST := $(wildcard tests/unit tests/contract tests/property tests/golden)

# Two runs of pytest: no fast test shares a process with Ray.
test: $(if $(filter 0,$(REDIS)),,.venv/bin/redis-server) .venv/.installed-dev  ## unit, contract, property and golden tests, then the integration tests (REDIS=0: none that needs a Redis)
	python -m $(PYTEST) $(FAST)
	python -m $(PYTEST) tests/integration

coverage: $(if $(filter 0,$(REDIS)),,.venv/bin/redis-server) .venv/.installed-dev  ## the fast tests again, counting lines and branches; fails below the floor in pyproject.toml
	coverage run -m $(PYTEST) $(FAST)
	coverage report

lint: .venv/.installed-dev audit  ## ruff, pyright (strict), import-linter, and the audit
	ruff check .
	ruff format --check .
	pyright
	lint-imports

audit: .venv/.installed-dev  ## secrets in the tree, and known vulnerabilities of the pinned dependencies
	git ls-files -z | xargs -0 detect-secrets-hook --exclude-secrets '^recsys-keys$$'
	pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

hooks: .venv/.installed-dev  ## have git run the quick part of lint before every commit (.pre-commit-config.yaml)
	pre-commit install

format: .venv/.installed-dev  ## let ruff mend what it can
	ruff check --fix .
	ruff format .

fuzz: .venv/.installed-dev  ## thousands of requests of every kind to a running server, judged by its OpenAPI
	python -m pytest -m slow -s tests/integration/test_live_api.py

bench-spine: .venv/.installed-dev  ## measure the figures of tests/benchmarks/results/spine.json
	python tests/benchmarks/spine.py

# Other libraries, to be measured beside: their pins and ours exclude each other.
.venv-peers/.installed: tests/benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r $<
	touch $@

peers: .venv-peers/.installed  ## install the libraries that suites and benchmarks measure beside ours

bench-serve: .venv/.installed-dev  ## measure the figures of tests/benchmarks/results/serving.json
	python tests/benchmarks/serving.py

bench-faults: .venv/.installed-dev  ## kill, lock and take away parts of a served graph under load
	python tests/benchmarks/faults.py

bench-realtime: .venv/.installed-dev .venv/bin/redis-server  ## measure how soon and how surely events count
	python tests/benchmarks/realtime.py

bench-online: .venv/.installed-dev  ## replay a year of Online Retail week by week: models that go on learning
	python tests/benchmarks/online.py

bench-cold-start: .venv/.installed-dev  ## how much is known after 0, 1, 2, 5 and 10 interactions of a user or an item
	python tests/benchmarks/cold_start.py

bench-quality: .venv/.installed-dev .venv-peers/.installed  ## train and judge the suites; hours; goes on where it was stopped
	python tests/benchmarks/quality.py

bench-families: .venv/.installed-dev .venv-peers/.installed  ## measure the figures of tests/benchmarks/results/families.json; hours; goes on where it was stopped
	python tests/benchmarks/families.py

bench-training: .venv/.installed-dev .venv-peers/.installed  ## measure training speed beside RecTools
	python tests/benchmarks/training.py

bench-house: .venv/.installed-dev  ## measure the code itself: circles, blocks that stand twice, lines, what a new kind costs
	python tests/benchmarks/house.py

bench-front: .venv/.installed-dev  ## measure what a newcomer meets first: imports, help, what the demo prints
	python tests/benchmarks/front.py

AGAINST ?= HEAD
same-behaviour: .venv/.installed-dev  ## show what behaves otherwise than at a revision, to the last bit (AGAINST=REV, else HEAD); minutes
	python tests/benchmarks/same_behaviour.py --against $(AGAINST)

schemas: .venv/.installed-dev  ## write the JSON schemas of configuration files, which editors read, into configs/schema
	mkdir -p configs/schema
	for name in run benchmark ratings serve; do \
	  recsys config schema "$$(grep -rl --include='*.yaml' "schema/$$name.json" configs | head -n 1)" > configs/schema/$$name.json; \
	done

# Pins that stand in the file are kept: delete a line to have the newest of that package, or write another version.
constraints: .venv/.installed-dev  ## write constraints.txt anew from pyproject.toml
	uv pip compile --quiet pyproject.toml --extra all --extra dev --extra cpu --extra gpu --python-version 3.11 \
	  --no-emit-package pip --no-emit-package setuptools --no-annotate \
	  --custom-compile-command 'make constraints' --output-file constraints.txt

wheel: .venv/.installed-dev  ## build dist/recsys_ray-*.whl
	python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove the environment, artefacts and caches
	rm -rf .venv .venv-peers runs dist build .coverage .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
