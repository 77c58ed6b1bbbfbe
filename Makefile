# You need Python with venv, make and git. The first call creates an environment, later calls reuse it.
#
#   make env                   environment to train, evaluate and run the demos
#   make demo                  train Mask R-CNN on synthetic images, evaluate it and draw its detections
#   make demo-photos           download photographs of blood cells, train RTMDet on them, evaluate it, draw its detections
#   make demo-classification   train a classifier on handwritten digits and start a detector from its weights
#
# For contributors, with further packages in the same environment:
#
#   make test                  the tests to run before a push
#   make test-all              all tests
#   make lint                  ruff and mypy
#   make docs                  the documentation as a website
#
# Variables:
#   DATA=DIR                    for demo-photos: your folder of BCCD; nothing is downloaded
#   PYTHON=python3.12           Python that creates the environment
#   DISTRIBUTION=onedl          distribution of the OpenMMLab packages: onedl or openmmlab
#   VENV=.venv                  folder of the environment (default with openmmlab: .venv-openmmlab)
#   TORCH='torch==… --index-url …'  build of PyTorch, as arguments of pip install
PYTHON ?= python3
DISTRIBUTION ?= onedl
VENV ?= $(if $(filter onedl,$(DISTRIBUTION)),.venv,.venv-$(DISTRIBUTION))
TORCH ?= -r requirements/torch.txt

ifeq ($(filter onedl openmmlab,$(DISTRIBUTION)),)
$(error DISTRIBUTION=$(DISTRIBUTION) is unknown. Use onedl or openmmlab)
endif

INSTALLED = $(VENV)/.installed-$(DISTRIBUTION)
PIP_INSTALL = $(VENV)/bin/python -m pip install -c requirements/constraints.txt
# One thread per process, because pytest runs two processes.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

# pip would keep the installed build of PyTorch, so another TORCH needs another environment.
ifneq ($(wildcard $(INSTALLED)),)
ifneq ($(origin TORCH),file)
ifneq ($(strip $(shell cat $(INSTALLED))),$(strip $(TORCH)))
$(error $(VENV) was created with TORCH='$(strip $(shell cat $(INSTALLED)))'. Delete it or choose another folder with VENV=…)
endif
endif
endif

.PHONY: env env-dev demo demo-photos demo-classification test test-all test-distributed lint docs audit mutants

env: $(INSTALLED)

$(INSTALLED): setup.py requirements/torch.txt requirements/constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(TORCH)
	$(PIP_INSTALL) -e '.[$(DISTRIBUTION),demo]'
	echo '$(TORCH)' > $@

env-dev: $(INSTALLED)-dev

$(INSTALLED)-dev: $(INSTALLED)
	$(PIP_INSTALL) -e '.[$(DISTRIBUTION),seg-$(DISTRIBUTION),dev]'
	touch $@

demo: env
	$(VENV)/bin/python tools/demo.py detection

demo-photos: env
	$(VENV)/bin/python tools/demo.py photos $(if $(DATA),--data '$(DATA)')

demo-classification: env
	$(VENV)/bin/python tools/demo.py classification

# Tests of a file run in the same process, because they share trained models.
test: env-dev
	$(PYTEST) -n 2 --dist loadfile -m 'not slow and not distributed'

test-all: env-dev
	$(PYTEST) -n 2 --dist loadfile -m 'not distributed' --cov
	$(PYTEST) -m distributed

# Trainings in two and four processes, with errors and kills. They use all cores, so they run one after another.
test-distributed: env-dev
	$(PYTEST) -m distributed

lint: env-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Writes docs/_build/html/index.html. Warnings are errors.
docs: $(INSTALLED)-docs
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

$(INSTALLED)-docs: $(INSTALLED)
	$(PIP_INSTALL) -e '.[$(DISTRIBUTION),docs]'
	touch $@

# Known vulnerabilities of the installed packages, from osv.dev.
audit: env-dev
	$(VENV)/bin/pip-audit --local --vulnerability-service osv --progress-spinner off

# Mutation tests of the modules in [tool.mutmut] of pyproject.toml. Takes hours.
mutants: env-dev
	$(VENV)/bin/python -m pip install mutmut
	OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run --max-children 2
	$(VENV)/bin/mutmut results
