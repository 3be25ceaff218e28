# The first `make search` or `make test` makes .venv; it needs nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Printed instead of pip's own, longer, complaint. In Python 2's syntax too, so that any Python can say it.
CHECK := import sys; sys.version_info >= (3, 11) or sys.exit("hintsearch needs Python 3.11 or newer; %s is %d.%d" \
	% ((sys.executable,) + tuple(sys.version_info[:2])))

.PHONY: search test fuzz test-system lint typecheck clean

search: .venv/.installed
	@$(BIN)/hintsearch search

test: .venv/.installed
	@$(BIN)/python -m pytest

# The property tests with examples of its own at every call.
fuzz: .venv/.installed
	@$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=drawn

# Kills searches in every way, the longest tests first.
test-system: .venv/.installed
	@$(BIN)/python -m pytest --numprocesses=4 --no-loadscope-reorder tests/system

lint: .venv/.installed
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

# mypy does not follow setuptools' package-dir, so it reads an installed copy. A build/lib left by an earlier build
# would bring deleted modules back.
typecheck: .venv/.installed
	@rm -rf build/lib build/typecheck
	@$(PIP) install --no-deps --target build/typecheck .
	@cd build/typecheck && ../../$(BIN)/python -m mypy --strict \
		--config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p hintsearch

# Keeps .venv, and the results and tracking store of searches.
clean:
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# A .venv without pip is one whose making was cut short: it is made again.
.venv/.installed: pyproject.toml
	@$(BIN)/python -c 'import pip' 2>/dev/null || { $(PYTHON) -c '$(CHECK)' && $(PYTHON) -m venv .venv; }
	@$(BIN)/python -c '$(CHECK)'
	@echo "Installing hintsearch into .venv; the first time takes some minutes."
	@$(PIP) install --editable '.[dev]'
	@touch $@
