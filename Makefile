# Each target sets up what it needs, in .venv.
PYTHON ?= python3
# the version that is tested; another build or version: make TORCH=torch==2.12.0
TORCH ?= torch==2.13.0
# scripts are run by path: the repository root is never on sys.path
export PYTHONSAFEPATH = 1

.PHONY: throughput test test-all lint clean

throughput: .venv/ready
	.venv/bin/python benchmarks/throughput.py $(ARGS)

test: .venv/ready lint
	.venv/bin/python -m pytest -n auto $(ARGS)

test-all: .venv/ready lint
	FASTMIM_TEST_ALL=1 .venv/bin/python -m pytest -n auto $(ARGS)

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/ready: pyproject.toml setup.py
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q "$(TORCH)"
	.venv/bin/python -m pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
