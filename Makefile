# Everything lives in .venv, installed from constraints.txt. Python 3.11, pip and make are enough.
PYTHON ?= python3.11
EXTRAS ?= test
BIN := .venv/bin
RUN := $(BIN)/python -m moejax
export JAX_PLATFORMS ?= cpu

.PHONY: setup quickstart report report-calibrated test slow lint bench systems clean

setup: .venv/installed-$(EXTRAS)

.venv/installed-$(EXTRAS): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

# Both are drawn anew each time: a run folder refuses another config than its own.
quickstart: setup
	rm -rf runs/quickstart
	$(RUN) run quickstart --out runs/quickstart

report: setup
	rm -rf runs/report
	$(RUN) run report --out runs/report

report-calibrated: setup
	rm -rf runs/report_calibrated
	$(RUN) run report_calibrated --out runs/report_calibrated

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup

slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow or assets or chromium"

lint:
	$(MAKE) setup EXTRAS=test,lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m moejax_kernels.grouped_matmul.bench
	$(BIN)/python -m moejax.weights.bench

systems: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests/systems -m ""
	$(RUN) systems --markdown > docs/systems.md

clean:
	rm -rf .venv build dist *.egg-info runs
