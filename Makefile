# `make demo`, `make test` and `make docs` need nothing but Python 3.11 or newer; all work in .venv. The tests of Kafka
# need Java, those of jobs Slurm, those of the live page Chromium.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
# Most tests wait for other processes, so several files go at once, on two cores as well.
together := --numprocesses=4 --dist=loadfile --no-loadscope-reorder
# Begin first, since they take longest: the others are done beside them.
longest := hpc_bridge docs fallback backfill bulk_manager planes examples adaptive kafka_plane bluesky_tiled live_page slurm \
	gateway_status start kill manager bluesky_transport until_precise_files command_line kafka
longest := $(longest:%=tests/test_%.py)

.PHONY: demo docs test kafka slurm chromium clean test-pbs

demo: $(VENV)/installed
	PATH="$(abspath $(bin)):$$PATH" sh docs/demo.sh

docs: $(VENV)/installed-for-docs
	$(bin)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build
	@echo docs/_build/index.html

test: $(VENV)/installed-for-test kafka slurm chromium
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/xpcs-stream compile & $(bin)/mypy && wait $$! # else the first tests wait for it
	$(bin)/lint-imports
	$(bin)/pytest $(together) $(longest) $(filter-out $(longest),$(sort $(wildcard tests/test_*.py)))
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(abspath $(VENV))/boundscheck $(bin)/pytest --numprocesses=2 --dist=loadfile tests/test_kernels.py tests/test_multitau.py tests/test_means.py tests/test_twotime.py

# Against a live OpenPBS, for whoever has one: tests/test_pbs.py says what it must be like.
test-pbs: $(VENV)/installed-for-test
	$(bin)/pytest -m pbs tests/test_pbs.py

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(bin)/pip install --quiet --disable-pip-version-check --no-compile --editable .
	touch $@

$(VENV)/installed-for-docs: $(VENV)/installed
	$(bin)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[docs]'
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

slurm_packages := slurmctld slurmd slurm-client slurmdbd munge mariadb-server
slurm:
	@if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v slurmdbd >/dev/null && \
		command -v munged >/dev/null && command -v mariadbd >/dev/null; then :; \
	elif [ -f /etc/debian_version ] && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --yes --no-install-recommends $(slurm_packages) >/dev/null || \
		echo "Slurm cannot be installed: its tests are skipped"; \
	else echo "no Slurm: its tests are skipped (Debian: apt-get install $(slurm_packages))"; fi

chromium:
	@if command -v chromium >/dev/null; then :; \
	elif [ -f /etc/debian_version ] && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null || \
		echo "Chromium cannot be installed: the tests of the live page are skipped"; \
	else echo "no Chromium: the tests of the live page are skipped (Debian: apt-get install chromium)"; fi

clean:
	rm -rf $(VENV) demo build docs/_build docs/_generated *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
