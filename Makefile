# Everything happens in .venv; every target that needs it sets it up first.
# Another interpreter: make install PYTHON=python3.13. More for pytest: make test ARGS='tests/test_house.py -x'.

.DEFAULT_GOAL := help
.PHONY: help install demo test lint check format bench wheel clean

export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
# pip would compile every file on one core; `compileall` uses them all, and leaves out other people's tests
PIP := $(BIN)/python -m pip install --quiet --quiet --no-compile --constraint constraints.txt
COMPILE := $(BIN)/python -m compileall -q -q -j 0 -x '/tests/' .venv/lib || true
STAMP := .venv/.installed
CHECK_STAMP := .venv/.installed-for-check
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
ARGS ?=

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv (again only when pyproject.toml or constraints.txt change)

# PyTorch goes first and by its pin, so that where a CPU build of that version is offered it is taken; the newest release,
# met as somebody's dependency, brings gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "longlora needs Python 3.11 or newer, and none is on the PATH." \
			"On Debian 12 or later: apt-get install --yes python3 python3-venv" >&2; exit 1; \
	elif [ ! -x $(BIN)/python ] && ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$(PYTHON) cannot make virtual environments." \
			"On Debian: apt-get install --yes python3-venv" >&2; exit 1; \
	fi
	@echo "Setting up .venv, once: a few minutes."
	test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	@$(COMPILE)
	@touch $@

demo: install ## extend the shipped model 512 -> 4096 tokens and write report.html
	$(BIN)/longlora demo $(ARGS)

test: install ## all tests (ten minutes at most)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: install ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: $(CHECK_STAMP) ## what CI runs: lint, types, all tests, those of every extra among them; none may be skipped for want of one
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ echo "make check tests the page in Chromium, which is not on the PATH. On Debian: apt-get install --yes chromium" >&2; exit 1; }
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(BIN)/mypy & types=$$!; \
	LONGLORA_NOTHING_MISSING=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS); tests=$$?; \
	wait $$types || { echo "mypy found something: make lint" >&2; exit 1; }; exit $$tests

$(CHECK_STAMP): $(STAMP)
	$(PIP) --editable '.[dev,check]'
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(COMPILE)
	@touch $@

format: install ## rewrite the sources as ruff wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## S2-Attn against full attention on this machine
	$(BIN)/longlora bench attention --length 8192 --group 2048 --heads 8 --head-dim 64 --dtype bfloat16 $(ARGS)

wheel: install ## build the wheel in dist/
	$(BIN)/python -m pip wheel --quiet --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

clean: ## remove .venv, dist and caches; runs/ and build/ stay, they hold trained work
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
