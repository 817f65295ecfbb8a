# Everything lives in .venv, installed from constraints.txt. Python 3.11, pip and make are enough.
PYTHON ?= python3.11
EXTRAS ?= test
BIN := .venv/bin
RUN := $(BIN)/python -m moejax
export JAX_PLATFORMS ?= cpu
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: setup quickstart report report-calibrated docs pods test slow lint bench systems clean

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

# What docs/ shows of the longer studies, figures and ledger included.
DOCUMENTED := report report_calibrated rare_experts
docs: setup
	set -e; for study in $(DOCUMENTED); do \
	  rm -rf runs/$$study; $(RUN) run $$study --out runs/$$study; \
	  rm -rf docs/$$study; mkdir docs/$$study; \
	  cd runs/$$study; \
	  cp -r config.gin results.json ledger.jsonl report.md report.html report.json plots ../../docs/$$study; \
	  cd ../..; done

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0

# These compute more than they compile: LLVM optimizes, which tests else do without.
slow systems: export XLA_FLAGS =

# Acceptance tests of systems are not among them: make systems runs those, and make pods the pods.
slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0 \
	  -m "slow or assets or chromium" --ignore tests/systems

lint:
	$(MAKE) setup EXTRAS=test,lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Peers on CPU by interleaved ratios, kernels on TPU by the compiler's schedule: docs/benchmarks.md.
bench:
	$(MAKE) setup EXTRAS=test,parity,aot
	$(BIN)/python -m experiments.benchmarks cpu
	$(BIN)/python -m experiments.benchmarks tpu
	$(BIN)/python -m moejax.weights.bench

# The shipped pod configs, compiled for their TPUs without one: docs/pods.md.
pods:
	$(MAKE) setup EXTRAS=test,aot
	rm -rf runs/pods
	$(BIN)/python -m experiments.pods

systems: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0 tests/systems -m ""
	$(RUN) systems --markdown > docs/systems.md

clean:
	rm -rf .venv build dist *.egg-info
