# Two commands for a newcomer: `make demo` and `make test`. Both set up `.venv` when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTO_STAMP := .venv-proto/.installed
BUF_VERSION := 1.75.0
BUF := .tools/buf-$(BUF_VERSION)/node_modules/.bin/buf

.PHONY: setup demo test lint format proto bench clean

setup: $(STAMP)

# Rebuilt only when what it was made from changes: the second run installs nothing.
$(STAMP): pyproject.toml constraints.txt mini/pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "cliptune needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	@echo 'Installs elpv-dataset for the demo: solar cell images, CC BY-NC-SA 4.0, non-commercial use only.'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' --editable ./mini
	@touch $@

demo: setup
	$(BIN)/cliptune demo

# Files side by side on the machine's cores: most of a test's time is a process that starts.
test: setup
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

lint: setup $(BUF) $(PROTO_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy bench scripts
	cd proto && ../$(BUF) lint
	$(BIN)/python -m scripts.proto --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Regenerates the committed stubs under sdk/cliptune.
proto: setup $(PROTO_STAMP)
	$(BIN)/python -m scripts.proto

bench: setup
	$(BIN)/python -m bench

# The generator is older than the runtime on purpose (stubs load on older and current protobuf), so it lives in an
# environment of its own.
$(PROTO_STAMP): scripts/proto-requirements.txt
	test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(BUF):
	npm install --silent --no-fund --no-audit --prefix .tools/buf-$(BUF_VERSION) @bufbuild/buf@$(BUF_VERSION)

clean:
	rm -rf $(VENV) .venv-proto .tools .mypy_cache .pytest_cache .ruff_cache
