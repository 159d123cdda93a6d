# ImgAE-Dx. `make` alone prints what there is.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
DATA   ?= synthetic
OUT    ?= runs
# What one comparison on the phantom trains with; ARGS come after it and so win.
QUICK  :=
ifeq ($(DATA),synthetic)
QUICK  := --samples 150 --epochs 2 --batch-size 4
endif
ARGS   ?=
EVAL_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train compare evaluate colab test drills bench stress coverage lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  DATA=folder, CSV or kaggle:owner/name (default: the built-in phantom)'
	@echo '  ARGS="--epochs 5 --seeds 3"   more flags for train.py;  EVAL_ARGS="..." for evaluate.py'
	@echo '  OUT=runs  PYTHON=python3  VENV=.venv'

# The stamp is made only once pip has succeeded, so that a broken install is tried again. It does not
# count where the environment's Python has gone, as after an upgrade of Python: then all is made anew.
$(shell $(PY) -c '' 2>/dev/null || rm -f $(VENV)/.installed)
# config.py alone does nothing but refuse a Python that is too old.
$(VENV)/.installed: requirements.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || { $(PYTHON) config.py && \
	  $(PYTHON) -m venv $$(test -f $(VENV)/pyvenv.cfg && echo --clear) $(VENV); }
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

setup: $(VENV)/.installed ## make .venv and install what requirements.txt names

train: setup ## train the U-Net
	$(PY) train.py --model unet --data "$(DATA)" --output-dir "$(OUT)" $(ARGS)

compare: setup ## train both models on the same data and budget, test and compare them
	$(PY) train.py --model both --data "$(DATA)" --output-dir "$(OUT)" --reuse $(QUICK) $(ARGS)
	$(PY) evaluate.py "$(OUT)" $(EVAL_ARGS)

evaluate: setup ## test and compare all runs in OUT
	$(PY) evaluate.py "$(OUT)" $(EVAL_ARGS)

colab: ## write a notebook, and one cell to paste, for Google Colab to build/
	$(PYTHON) tests/colab.py

# What only tests need: DICOM files, a real kernel of a notebook, several processes at a time (three:
# some wait for programs that they start).
TEST_PACKAGES := 'pydicom>=3.0' 'ipykernel>=6' 'nbformat>=5' 'pytest-xdist>=3.5'

test: setup ## run the tests
	$(PY) -m pip install --quiet --disable-pip-version-check $(TEST_PACKAGES)
	$(PY) -m pytest -q -m "not drill" -n 3 --dist worksteal tests $(ARGS)

drills: setup ## run the long tests: faults, notebooks, the benchmark, what docs/extending.md adds
	$(PY) -m pip install --quiet --disable-pip-version-check $(TEST_PACKAGES)
	$(PY) -m pytest -q -m drill tests $(ARGS)

bench: setup ## measure speed and memory against plain loops, into bench.json
	$(PY) tests/bench.py $(ARGS)

stress: setup ## score validation images of all runs in OUT, changed as another hospital's may be
	$(PY) tests/stress.py "$(OUT)" $(ARGS)

coverage: setup ## run the tests and the drills, and say which lines they leave out
	$(PY) -m pip install --quiet --disable-pip-version-check $(TEST_PACKAGES) 'coverage>=7.10'
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -q tests $(ARGS)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report

lint: setup ## check style and types
	$(PY) -m pip install --quiet --disable-pip-version-check 'ruff>=0.9' 'mypy>=1.14'
	$(PY) -m ruff check .
	$(PY) -m mypy

clean: ## remove caches (never runs, never .venv)
	rm -rf __pycache__ tests/__pycache__ .pytest_cache .ruff_cache .mypy_cache .coverage* build
