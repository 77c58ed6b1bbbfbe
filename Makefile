# `make demo` and `make test` need Python with venv, make and git, and nothing else. A second call reuses the environment.
#   PYTHON=python3.12           the Python to make it with
#   VENV=.venv                  where it is
#   FAMILY=onedl                whose OpenMMLab packages: onedl or openmmlab
#   TORCH='torch==… --index-url …'  another torch build: anything that pip install takes
PYTHON ?= python3
VENV ?= .venv
FAMILY ?= onedl
TORCH ?= -r requirements/torch.txt

INSTALLED = $(VENV)/.installed-$(FAMILY)

.PHONY: env demo test lint

env: $(INSTALLED)

$(INSTALLED): setup.py requirements/torch.txt requirements/constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -m pip install -c requirements/constraints.txt -e '.[$(FAMILY),dev]'
	touch $@

demo: env
	$(VENV)/bin/python tools/demo.py

# Two processes of one thread each: a file's tests stay together, because they share what they have trained.
test: env
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
