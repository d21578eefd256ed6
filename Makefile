# Two commands on a fresh machine: `make run` and `make test`. Everything lives in .venv.
# Options of the program: make run ARGS="--model DIR --dram 4GiB"

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# setuptools warns at length that an editable installation is editable.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
PROMETHEUS := $(VENV)/prometheus
BROWSER := $(VENV)/browser

.DEFAULT_GOAL := help
.PHONY: help run install prometheus browser screenshots dashboards dashboards-check test lint types imports check format test-stacks test-parts equality soak chaos kills damage churn compose-test bench test-gpu clean

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

run: $(INSTALLED)  ## install what is missing and start everything; Ctrl-C stops it
	@exec $(BIN)/cachedattention up $(ARGS)

install: $(INSTALLED)  ## install only

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "       Name another with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# torch first and alone: it is most of the download, and a change of our own dependencies leaves it as it is.
$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing $(TORCH)"
	@$(PIP) install "$(TORCH)"
	@echo "installing cachedattention"
	@$(PIP) install -e . -c constraints.txt
	@touch $@

$(INSTALLED_TEST): $(INSTALLED)
	@echo "installing what tests need"
	@$(PIP) install -e '.[test]' -c constraints.txt
	@touch $@

# Prometheus and promtool, for the tests of rules and dashboards. In CI they must be there; elsewhere those tests skip.
$(PROMETHEUS): tests/monitoring/fetch
	@echo "fetching Prometheus"
	@tests/monitoring/fetch $@ && touch $@ || [ -z "$$CI" ]

prometheus: $(PROMETHEUS)  ## Prometheus and promtool for the tests, from Debian

# Chromium, for the tests of the page; likewise.
$(BROWSER): tests/page/fetch
	@echo "fetching Chromium"
	@tests/page/fetch $@ && touch $@ || [ -z "$$CI" ]

browser: $(BROWSER)  ## Chromium for the tests, from Debian

screenshots: $(INSTALLED_TEST) $(BROWSER)  ## pictures of the page for the README
	$(BIN)/python -m tests.page.screenshots docs/images

dashboards: $(INSTALLED_TEST)  ## write Grafana's dashboards anew
	$(BIN)/python monitoring/grafana/make_dashboards.py

dashboards-check: dashboards  ## check them against Grafana's own types (needs npm)
	tests/monitoring/grafana_types/check

# Those that start whole stacks of processes run one after another, for two at once starve each other on two cores; the
# others beside them.
test: $(INSTALLED_TEST) $(PROMETHEUS) $(BROWSER)  ## run the tests (minutes)
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-stacks test-parts

# 5: ARGS choose none of these.
test-stacks test-parts: test-%:
	$(BIN)/python -m pytest --durations 15 -m "not slow and not gpu and $(if $(filter parts,$*),not )stack" $(ARGS) || [ $$? = 5 ]

lint: $(INSTALLED_TEST)  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED_TEST)  ## type checks
	$(BIN)/mypy

imports: $(INSTALLED_TEST)  ## who may import whom
	$(BIN)/lint-imports

check: lint types imports  ## lint, types and imports

format: $(INSTALLED_TEST)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

equality: $(INSTALLED_TEST)  ## all shapes of models over all conversations, against transformers
	EQUALITY_CONVERSATIONS=20 $(BIN)/python -m pytest -rP tests/end_to_end/test_equality.py $(ARGS)

soak: $(INSTALLED_TEST)  ## thousands of turns; watches memory
	$(BIN)/python -m pytest -m slow tests/end_to_end -k soak $(ARGS)

chaos: $(INSTALLED_TEST)  ## kills processes during turns
	$(BIN)/python -m pytest -m slow tests/faults $(ARGS)

kills: $(INSTALLED_TEST)  ## 350 kills at named places and at random, against a record of what was saved (an hour)
	KILLS=300 $(BIN)/python -m pytest -rP tests/faults/test_kills.py $(ARGS)

damage: $(INSTALLED_TEST)  ## thousands of flipped bits, swapped records, cut files (an hour)
	DAMAGES=1000 $(BIN)/python -m pytest -rP tests/faults/test_damage.py $(ARGS)

churn: $(INSTALLED_TEST)  ## saves five times the SSD tier at three sizes, and watches what it takes (minutes)
	CHURN=5 $(BIN)/python -m pytest -rP tests/faults/test_kvdaemon_caps.py $(ARGS)

compose-test:  ## build the image, run compose.yaml in a Docker engine of its own (root; minutes)
	tests/compose/run

bench: $(INSTALLED)  ## time to first token, with and without reuse
	$(BIN)/python -m benchmarks.turns $(ARGS)

test-gpu: $(INSTALLED_TEST)  ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) .cache/grafana_types *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
