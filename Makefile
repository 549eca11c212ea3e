# make distill   the demo, from an empty machine with Python 3.11 to a report
# make test      the tests         make lint   ruff and mypy
# make bench     how fast it is, beside its peers; some of it: make bench BENCH="embedding training"
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
BENCH_READY := .venv/bench
BENCH ?=

.PHONY: distill test bench lint format clean

distill: $(READY)
	$(BIN)/python jobs/distill.py recipes/demo.yaml

test: $(READY)
	$(BIN)/python -m pytest

bench: $(BENCH_READY)
	$(BIN)/python -m benchmarks $(BENCH)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cluster,demo,dev,langid,optuna]'
	touch $(READY)

$(BENCH_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $(BENCH_READY)

clean:
	rm -rf .venv runs
