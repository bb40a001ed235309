# All files stay inside the checkout: packages in .venv, models and data in .fleet.

# The first suitable interpreter on PATH; `make PYTHON=/path/to/python3.12 install` overrides it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := demo
.PHONY: install demo serve test check

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "lorafleet needs Python 3.11 or 3.12: put one on PATH, or run make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { \
		echo "$(PYTHON) cannot create a virtual environment (on Debian: apt install python3-venv)" >&2; \
		exit 1; }
	@echo "installing into .venv; the first run takes minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Starts two replicas of one base model with three adapters, asks each model a question, and stops.
demo: install
	$(BIN)/python -m tests.demo.demo

# Runs the same fleet on port 8000 (or make serve PORT=…) until Ctrl-C; prints a curl line to try.
serve: install
	$(BIN)/python -m tests.demo.demo --serve $(if $(PORT),--port $(PORT))

# Runs all tests that need no GPU. ARGS goes to pytest: make test ARGS='-k policy -x'.
test: install
	$(BIN)/python -m pytest $(ARGS)

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
