# make demo and make test need nothing but a fresh clone: each command builds .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what it imports. pip would compile all files of all packages, which takes longer than fetching them.
INSTALL := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt
PROCESSES := $(shell expr $$(nproc) \* 3 / 2)

# The tests start hundreds of processes. Without bytecode files each of them would compile this package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test long check clean

demo: .venv/package
	@$(BIN)/framepackd demo

# Each file of tests runs in one process with one thread: the tiny models gain nothing from threads. There are more
# processes than cores, because a third of the time the tests only wait for daemons. The files run in the order of the
# folders: the slow files come first, and many quick ones fill the end.
test: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder -m "not gpu and not systemd and not long" --durations=15

# Tests that take minutes. As root, with systemd-nspawn, also the service on a real systemd.
long: .venv/installed
	@SPAWN_WORKERS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --durations=15
	@[ $$(id -u) != 0 ] || BOOT_SYSTEMD=1 $(BIN)/python -m pytest -m systemd -s

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installs what the daemon needs, and nothing more.
.venv/package: pyproject.toml constraints.txt setup.py
	@echo "First, once: pip fetches torch and other packages into .venv, 1.6 GB on disk for the CPU; with CUDA, which"
	@echo "PyPI's torch brings, several GB more. That takes one to ten minutes. Then a demo takes less than one."
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

# Installs also what tests and checks need.
.venv/installed: .venv/package
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo
