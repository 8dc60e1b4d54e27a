# Two commands on a fresh machine; each builds .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROCESSES := $(shell expr $$(nproc) \* 3 / 2)

# Hundreds of processes are started here, and each would compile this package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test long check clean

demo: .venv/package
	@$(BIN)/framepackd demo

# A file a process and a thread each: the tiny models gain nothing from threads. More processes than cores: a third
# of the time nothing computes, the tests wait for daemons. In the order of the folders: the slow files come first,
# and many quick ones fill up the end.
test: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder -m "not gpu and not systemd and not long" --durations=15

# What takes minutes; and with root and systemd-nspawn the service on a real systemd.
long: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --durations=15
	@[ $$(id -u) != 0 ] || BOOT_SYSTEMD=1 $(BIN)/python -m pytest -m systemd -s

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the daemon needs, and nothing more.
.venv/package: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

# And what tests and checks need.
.venv/installed: .venv/package
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo
