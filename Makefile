# All files stay inside the checkout: packages in .venv, models and data in .fleet.

# The first suitable interpreter on PATH; `make PYTHON=/path/to/python3.12 install` overrides it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := demo
.PHONY: install demo serve test clients check audit

# Beginnings of keys and tokens as their issuers make them.
SECRETS := -----BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30}|sk-[A-Za-z0-9_-]{24}
SECRETS := $(SECRETS)|xox[abpr]-[0-9A-Za-z-]{10}|glpat-[A-Za-z0-9_-]{20}

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
	@if git grep -nIE -e '$(SECRETS)'; then echo "these look like secrets" >&2; exit 1; fi

# Runs other people's clients and schemathesis against the demo's fleet. Needs a package index, and Node for
# some of them. ARGS goes to it: make clients ARGS='--only with_openai'.
CLIENTS := tests/clients
clients: install
	@for file in $(CLIENTS)/requirements*.txt; do \
		venv=.venv/$$(basename $$file .txt | sed s/requirements/clients/); \
		$(PYTHON) -m venv $$venv && $$venv/bin/pip install -qq --disable-pip-version-check \
			--no-deps -r $$file || exit 1; \
	done
	cd $(CLIENTS)/node && npm ci --silent
	$(BIN)/python -m tests.clients.run $(ARGS)

# Looks the pinned versions up among known vulnerabilities. Needs a package index, so `check` leaves it out.
audit:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install -qq --disable-pip-version-check pip-audit==2.10.1
	.venv/audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt
