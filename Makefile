# `make demo` and `make test` need nothing but Python 3.11 or newer; both work in .venv.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/installed
	PATH="$(abspath $(bin)):$$PATH" sh docs/demo.sh

test: $(VENV)/installed-for-test
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/pytest
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(abspath $(VENV))/boundscheck $(bin)/pytest tests/test_kernels.py tests/test_multitau.py tests/test_means.py

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(bin)/pip install --quiet --disable-pip-version-check --no-compile --editable .
	touch $@

$(VENV)/installed-for-test: $(VENV)/installed
	$(bin)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
