# make demo        train a small model from nothing, evaluate it and write a report (about five minutes on two CPU cores)
# make test        the fast tests (under 10 minutes on two CPU cores)
# make test-slow   the tests that are long, real or rare, a soak test and the demo (under 35 minutes)
# make test-gpu    the tests that need a GPU, five at once on each; why one fails is printed as it fails
# make docs        the site of docs/, with the API reference, into site/; a broken link is an error
# make lint        ruff and mypy
# make clean       remove what make and the tests created, but not data/ and runs/

# Use the first of these that is Python 3.11 or 3.12. `make PYTHON=/path/to/python demo` chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
PIP_FLAGS ?=
RUN = .venv/bin/python

.PHONY: demo test test-slow test-gpu docs lint clean

demo: .venv/installed
	$(RUN) scripts/prepare_data.py --out data/demo stdlib
	$(RUN) train.py
	$(RUN) eval.py
	$(RUN) scripts/report.py runs/demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow"

# One process more than there are cores, because many of these tests wait for other processes.
test-slow: .venv/installed docs
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $$($(RUN) -c 'import os; print(min(os.cpu_count() + 1, 8))') \
		--dist worksteal -m slow

# Inductor would start a process for each core in each of these processes.
test-gpu: .venv/installed
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(RUN) -m pytest \
		-n $$($(RUN) -c 'import torch; print(5 * max(1, torch.cuda.device_count()))') --dist worksteal -vv -m gpu

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "glalm needs Python 3.11 or 3.12: make PYTHON=/path/to/python3.12 demo" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
