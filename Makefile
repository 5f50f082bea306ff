PYTHON ?= python3
VENV   ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
NODE_STAMP := widgets/node_modules/.installed
MODEL := smollm2-135m
APP_ARGS ?=

.PHONY: setup app lab test kinds lint lint-python lint-js docs bench bench-gpu clean browser model notebooks

setup: $(STAMP)  ## a virtual environment with everything in it

# `dev` takes all other extras but `benchmarks` with it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

model: setup  ## the default model in the user's cache
	$(BIN)/workbench models fetch $(MODEL)

app: model  ## the workbench in the browser
	$(BIN)/workbench app $(APP_ARGS)

lab: model  ## the notebooks in JupyterLab, trusted; what is saved keeps pictures in place of live views
	$(BIN)/jupyter trust notebooks/*.ipynb
	$(BIN)/jupyter lab --ServerApp.jpserver_extensions="{'workbench_widgets.saving': True}" notebooks

# The browser tests drive the system's Chromium; where it cannot be installed they skip and say so.
browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && apt-get install -y -qq chromium chromium-driver; \
	else echo "Chromium is not here and cannot be installed without root: browser tests will be skipped"; fi

test: setup browser model  ## every test, then every notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
	@if ls notebooks/*.ipynb >/dev/null 2>&1; then \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --nbval --nbval-current-env --nbval-cell-timeout 600 --timeout 600 \
			$$(test -f notebooks/sanitize.cfg && echo --nbval-sanitize-with notebooks/sanitize.cfg) notebooks; fi

kinds: setup  ## every kind of causal model of transformers is exact or refused; `make test` tries a third of them
	WORKBENCH_ALL_KINDS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/models/test_kinds.py

notebooks: model  ## run the notebooks and save what they show
	$(BIN)/python notebooks/execute.py

lint: lint-python lint-js  ## formatting, style, which room may import which, types

lint-python: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: setup  ## the site, in build/site; needs no network, and a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint-js: $(NODE_STAMP)  ## the same for widgets/js; needs no network once its tools are there
	cd widgets && node_modules/.bin/biome ci js types.d.ts && node_modules/.bin/tsc --project .

$(NODE_STAMP): widgets/package.json widgets/package-lock.json
	@command -v npm >/dev/null || { echo "make lint checks widgets/js with Node.js 20 or later, which is not here: install it, or run make lint-python"; exit 1; }
	cd widgets && npm ci --no-audit --no-fund
	touch $@

bench: model  ## the figures in benchmarks/results
	$(BIN)/python -m benchmarks

bench-gpu: setup  ## the kernels' figures on this machine's CUDA device, and docs/kernels.md with them
	cd kernels && PYTHONPATH=.. $(abspath $(BIN))/python -m bench && PYTHONPATH=.. $(abspath $(BIN))/python -m bench.table

clean:  ## everything that can be made again, the environment included
	rm -rf $(VENV) widgets/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
