# `make demo`, `make demo-classification` and `make test` need Python with venv, make and git, and nothing else. A second
# call reuses the environment.
#   PYTHON=python3.12           the Python to make it with
#   FAMILY=onedl                whose OpenMMLab packages: onedl or openmmlab
#   VENV=.venv                  where it is; .venv-openmmlab for the other family
#   TORCH='torch==… --index-url …'  another torch build: anything that pip install takes
PYTHON ?= python3
FAMILY ?= onedl
VENV ?= $(if $(filter onedl,$(FAMILY)),.venv,.venv-$(FAMILY))
TORCH ?= -r requirements/torch.txt

INSTALLED = $(VENV)/.installed-$(FAMILY)

# Another TORCH needs another environment: pip would leave the torch that is there.
ifneq ($(wildcard $(INSTALLED)),)
ifneq ($(origin TORCH),file)
ifneq ($(strip $(shell cat $(INSTALLED))),$(strip $(TORCH)))
$(error $(VENV) was made with TORCH='$(strip $(shell cat $(INSTALLED)))': remove it, or name another with VENV=…)
endif
endif
endif

.PHONY: env demo demo-classification test test-processes lint audit mutants

env: $(INSTALLED)

$(INSTALLED): setup.py requirements/torch.txt requirements/constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -m pip install -c requirements/constraints.txt -e '.[$(FAMILY),dev]'
	echo '$(TORCH)' > $@

demo: env
	$(VENV)/bin/python tools/demo.py detection

demo-classification: env
	$(VENV)/bin/python tools/demo.py classification

# Two processes of one thread each: a file's tests stay together, because they share what they have trained.
test: env
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m 'not processes' --cov

# What two and four processes do, and what happens when one of them dies: some eight minutes more.
test-processes: env
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m processes

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Known vulnerabilities of the installed packages, from osv.dev.
audit: env
	$(VENV)/bin/pip-audit --local --vulnerability-service osv --progress-spinner off

# Hours: what [tool.mutmut] in pyproject.toml names, changed in one place after the other, and whether a test notices.
mutants: env
	$(VENV)/bin/python -m pip install mutmut
	OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run --max-children 2
	$(VENV)/bin/mutmut results
