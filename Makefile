# make quickstart    a fresh clone to a picture: .venv, install, then `supar-sweep quickstart`
# make test          the same set-up, then the test suite but for its slow tests and those on a cluster
#
# PYTHON=python3.12                  which Python makes .venv (3.11, 3.12 or 3.13; default: the first one found)
# TORCH=torch==2.13.0                which torch to install (any pip arguments; default: torch). A small CPU-only one:
#                                    TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# ARGS="size=smoke"                  further words for `supar-sweep quickstart`
# PYTEST_ARGS="-k rules -n 0"        further arguments for pytest
# BENCH_ARGS="--only a"              further arguments for the benchmarks (--help lists them)
#
# All paths are relative: the checkout may stand in a folder with spaces in its name.

PYTHON ?=
TORCH ?= torch
ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

# Passed through the environment: pasted into the recipe, `torch>=2.6` would be a redirection.
export PYTHON TORCH

.DEFAULT_GOAL := help
.ONESHELL:
SHELL := /bin/sh
.SHELLFLAGS := -euc
.PHONY: help quickstart test slow cluster docs bench check lint types format setup clean

help: ## this list
	@sed -n 's/^# \{0,1\}//; /^$$/q; p' Makefile
	grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 19

quickstart: setup ## tune, transfer, sweep and draw on this machine's CPU, in minutes
	@.venv/bin/python -m supar_sweep quickstart $(ARGS)

test: setup ## the test suite but for slow tests and a cluster
	@.venv/bin/python -m pytest -n auto -m "not slurm and not slow" $(PYTEST_ARGS)

slow: setup ## the slow tests that need no cluster
	@.venv/bin/python -m pytest -n auto -m "slow and not slurm" $(PYTEST_ARGS)

# One more try for a test that failed, and the log says so: what they wait for are a machine's daemons.
cluster: setup ## the tests on a SLURM of their own, started and stopped by them; needs its packages, ten minutes
	@.venv/bin/python -m pytest -n 0 -m slurm --reruns 1 -raR $(PYTEST_ARGS)

docs: setup ## the documentation as a site in build/docs, any warning an error; then the examples on its pages
	@.venv/bin/python -c 'import furo, myst_parser' 2>/dev/null || .venv/bin/python -m pip install -q -e '.[docs]'
	.venv/bin/python -m sphinx -q -E -W --keep-going -b html docs build/docs
	.venv/bin/python -m pytest -q -n 0 tests/test_docs.py
	echo "make: open build/docs/index.html" >&2

bench: setup ## the benchmarks: tables, bars, a results file; half an hour on a quiet machine
	@.venv/bin/python -m benchmarks $(BENCH_ARGS)

check: lint types ## lint and types

lint: setup ## ruff: rules and format
	@.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: setup ## mypy --strict
	@.venv/bin/python -m mypy --strict

format: setup ## rewrite the files as `lint` wants them
	@.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean: ## remove .venv, caches and builds; runs/ stays
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installs only what changed: the stamp, written last, says which torch was asked for and where the checkout stood.
setup: ## .venv with everything installed (again only after pyproject.toml, TORCH or the folder's place changed)
	@set -f
	stamp=.venv/.supar-installed
	here=$$(pwd -P)
	if [ -x .venv/bin/python ] && [ "$$stamp" -nt pyproject.toml ] && [ "$$(tail -n 1 "$$stamp")" = "$$here" ]; then
	    case "$$TORCH" in torch|"$$(head -n 1 "$$stamp")") exit 0 ;; esac
	fi
	in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
	if .venv/bin/python -m pip --version >/dev/null 2>&1; then
	    .venv/bin/python -c "$$in_range" || {
	        echo "make: .venv holds Python $$(.venv/bin/python -V), but 3.11, 3.12 or 3.13 is needed. Run: make clean" >&2; exit 1; }
	else
	    python=; without_venv=; others=
	    if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3.11 python3.12 python3.13 python3; fi
	    for candidate in "$$@"; do
	        command -v "$$candidate" >/dev/null 2>&1 || continue
	        version=$$("$$candidate" -V 2>/dev/null) || continue # a pyenv shim for a Python that is not there
	        "$$candidate" -c "$$in_range" 2>/dev/null || { others="$$others $$candidate ($$version)"; continue; }
	        if "$$candidate" -c 'import venv, ensurepip' 2>/dev/null; then python=$$candidate; break; fi
	        without_venv=$${without_venv:-$$candidate}
	    done
	    if [ -z "$$python" ] && [ -n "$$without_venv" ]; then
	        version=$$("$$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	        echo "make: $$without_venv cannot create a virtual environment: its venv or ensurepip module is missing." >&2
	        echo "      Debian, Ubuntu: sudo apt install python$$version-venv" >&2
	        echo "      or name another Python: make PYTHON=/path/to/python3.12" >&2
	        exit 1
	    fi
	    if [ -z "$$python" ]; then
	        echo "make: no Python 3.11, 3.12 or 3.13 among: $$*.$${others:+ Found:$$others.}" >&2
	        echo "      Install one (Debian, Ubuntu: sudo apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2
	        exit 1
	    fi
	    echo "make: creating .venv with $$("$$python" -V)" >&2
	    "$$python" -m venv --clear .venv
	fi
	rm -f "$$stamp"
	echo "make: installing $$TORCH, then supar-sweep and its development tools into .venv" >&2
	quiet=-q; if [ -t 2 ]; then quiet=; fi # a person sees the downloads, a log does not
	.venv/bin/python -m pip install $$quiet $$TORCH
	.venv/bin/python -m pip install $$quiet -e '.[dev]'
	printf '%s\n%s\n' "$$TORCH" "$$here" > "$$stamp"
