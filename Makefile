# The one entrance: each target sets up what it needs on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
# What does no I/O has no excuse.
PURE := proxy_fsm/states.py,proxy_fsm/lifecycle.py,proxy_fsm/reasons.py,proxy_fsm/status.py,proxy_fsm/session.py,proxy_fsm/diagram/chart.py,proxy_fsm/diagram/machines.py,proxy_fsm/diagram/text.py,proxy_fsm/diagram/graphviz.py,proxy_fsm/evidence.py

# Side by side; a worker that has nothing left takes over what another has not begun. Compiled first: with
# PYTHONDONTWRITEBYTECODE every program that a test starts would compile the package again.
PYTEST = $(BIN)/python -m compileall -q proxy_fsm && $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test quick lint docs diagrams mutation faults soak bench system clean

demo: $(INSTALLED)
	@$(BIN)/proxy-fsm demo

test: $(READY) system lint docs
	$(PYTEST) --cov --cov-report=term $(PYTEST_ARGS)
	$(BIN)/coverage report --include=$(PURE) --fail-under=100

# Without the tests marked real: make quick PYTHON=python3.13 VENV=.venv-3.13
quick: $(READY)
	$(PYTEST) -m "not real" $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

diagrams: $(READY)
	$(BIN)/python -m tests.pictures

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html."

# Minutes: it tests the tests; docs/mutation.md has what came of it.
mutation: $(READY)
	$(BIN)/python -m tests.mutation $(addprefix proxy_fsm/,states.py lifecycle.py active_lifecycle.py supervisor.py engine.py)

# Minutes, as root: docs/faults.md is made of what it measures.
faults: $(READY) system
	$(BIN)/python -m tests.e2e.fault_table --measure

# Many minutes: what the tests do for seconds, at length; it prints what it did.
soak: $(READY) system
	$(BIN)/python -m tests.soak

# Half an hour, on a machine that does nothing else: benchmarks/README.md. `make bench BENCH_ARGS=--quick` tries it.
bench: $(READY) system
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

system:
	@tests/install-system-packages

$(INSTALLED): pyproject.toml
	@tests/make-venv $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[cli]"
	@touch $@

$(READY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[cli]" --group dev
	@touch $@

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage demo-output docs/_build
