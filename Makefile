# One command each: `make demo`, `make test`, `make check`. Each builds .venv when it is needed.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test check format clean

demo: $(STAMP)
	$(VENV)/bin/samssl study --config ray_configs/studies/demo.yaml

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) runs

# The stamp is written last, so a broken install is never taken for a whole one.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@
