# Two commands for a fresh machine with only Python, make and a network: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types unit slow docs wheel install clean
install: $(STAMP)

# `constraints.txt` pins every direct dependency, so that two machines install the same thing.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/distmatch demo

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/pytest -n 2

# What `make test` leaves out.
slow: $(STAMP)
	$(BIN)/pytest -n 2 -m slow

# The site of the documentation, build/docs/index.html. Warnings are errors; names that do not exist are warnings.
DOCS_STAMP := $(VENV)/.installed-docs
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet -j 2 -c docs . build/docs

# A source archive and a wheel, by the pinned hatchling of the environment: nothing is fetched.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/hatchling build -d dist

clean:
	rm -rf $(VENV) build dist *.egg-info
