# One command each: `make demo`, `make test`, `make check`, `make docs`. Each builds .venv when it is needed.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test check docs format constraints clean

demo: $(STAMP)
	$(VENV)/bin/samssl demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports

# The pages of docs/ as site/index.html, and before them the page that is made from the config classes.
docs: $(STAMP)
	$(VENV)/bin/python docs/configuration.py
	$(VENV)/bin/mkdocs build --strict

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# The newest versions that pyproject.toml allows, written down; run the tests before this is committed.
constraints:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	$(VENV)/bin/python .ci/constraints.py > constraints.new
	mv constraints.new constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs site dist

# The stamp is written last, so a broken install is never taken for a whole one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
