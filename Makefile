# Each target sets up .venv first (python3 -m app.setup.install): minutes the first time, nothing afterwards.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: setup demo test test-unit test-slow check bench soak clean

setup:
	@$(PYTHON) -m app.setup.install

demo: setup
	@$(BIN)/raylway demo

# Two processes: one runs the integration tests, the other one unit tests in the meantime.
test: setup
	@$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --no-loadscope-reorder

test-unit: setup
	@$(BIN)/python -m pytest tests/unit -n 2

test-slow: setup
	@$(BIN)/python -m pytest -m "slow and not gpu"

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python benchmarks/bench_train.py
	@$(BIN)/python benchmarks/bench_quality.py
	@$(BIN)/python benchmarks/bench_sweep.py
	@$(BIN)/python benchmarks/bench_serve.py

soak: setup
	@$(BIN)/python benchmarks/soak.py

clean:
	rm -rf .venv .raylway build *.egg-info
