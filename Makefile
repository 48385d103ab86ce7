# `make demo` and `make test` need nothing but Python 3.11 or newer; both work in .venv. The tests of Kafka need Java.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
# Most tests wait for other processes, so several files go at once.
together := --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: demo test kafka clean

demo: $(VENV)/installed
	PATH="$(abspath $(bin)):$$PATH" sh docs/demo.sh

test: $(VENV)/installed-for-test kafka
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/pytest $(together)
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(abspath $(VENV))/boundscheck $(bin)/pytest $(together) tests/test_kernels.py tests/test_multitau.py tests/test_means.py

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(bin)/pip install --quiet --disable-pip-version-check --no-compile --editable .
	touch $@

$(VENV)/installed-for-test: $(VENV)/installed
	$(bin)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[test]'
	touch $@

kafka:
	@if command -v java >/dev/null && command -v mvn >/dev/null; then :; \
	elif [ -f /etc/debian_version ] && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --yes --no-install-recommends default-jre-headless maven >/dev/null || \
		echo "Java and Maven cannot be installed: the tests of Kafka are skipped"; \
	else echo "no Java or no Maven: the tests of Kafka are skipped (Debian: apt-get install default-jre-headless maven)"; fi

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
