# Two commands for a newcomer: `make demo` and `make test`. Both set up everything they need.
PYTHON ?= python3
VENV ?= .venv
OUT ?= docs/results
JOBS ?= 2
BIN := $(VENV)/bin
CLEAN := $(abspath $(VENV)-wheel)
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/python $(INSTALL)

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs site dist mutants fuzz bench zoo packages thirdparty gpu clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Torch first: what is installed after it then fits the build that is there.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) pip setuptools wheel
	$(PIP) torch
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/dev: $(VENV)/installed
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/site: $(VENV)/installed
	$(PIP) -e ".[site]"
	@touch $@

$(VENV)/thirdparty: $(VENV)/installed
	$(PIP) -e ".[thirdparty,onnx]"
	@touch $@

packages: $(VENV)/thirdparty ## install other people's packages; `make test` then tries models of each

demo: $(VENV)/installed ## train a small network, convert it with and without calibration, compare
	$(BIN)/python -m sepconv demo

test: $(VENV)/installed ## run the tests, in JOBS processes
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

fuzz: $(VENV)/installed ## fuzz the kernels: against cuDNN on a GPU, else through the interpreter
	$(BIN)/python -m pytest --hypothesis tests/fuzz $(ARGS)

mutants: $(VENV)/installed ## plant bugs in the kernels; each must be caught
	$(BIN)/python tests/mutants/run.py

# Accuracy over time needs the trained networks: see docs/speed.md.
bench: $(VENV)/installed ## converted networks on this machine's CPU, against Inductor, onnxruntime and OpenVINO
	$(PIP) -e ".[zoo,rivals]"
	$(if $(SEPCONV_DATA),mkdir -p build && $(BIN)/python -m examples.studies.accuracy_latency measure \
	    --results build/accuracy-latency.json --plot build/accuracy-latency.png)
	$(BIN)/python -m examples.benchmarks.bench cpu $(ARGS)

zoo: $(VENV)/installed ## convert every architecture of torchvision and timm; takes hours, resumes
	$(PIP) -e ".[zoo]"
	$(BIN)/python -m examples.studies.zoo $(ARGS)

thirdparty: $(VENV)/thirdparty ## check all models of other people's packages; an hour, resumes
	$(BIN)/python tests/thirdparty/run.py $(ARGS)

# On the machine's own Python: a GPU machine has its own torch, and need not be on line.
# STEPS="compile fuzz" chooses steps, DRY=1 runs everything in small on a CPU.
gpu: ## every check and measurement on a GPU, in SECONDS; results in OUT
	$(PYTHON) examples/benchmarks/gpu.py --out $(OUT) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(STEPS),--steps $(STEPS)) $(if $(DRY),--dry-run)

lint: $(VENV)/dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed ## run every example in docstrings, README and docs
	$(BIN)/python -m pytest --import-mode=prepend --doctest-modules --doctest-glob='*.md' --ignore=docs/site sepconv README.md docs
	$(BIN)/python -m pytest --doctest-modules kernels/geometry.py kernels/cost_model.py

# Not --quiet, with which MkDocs counts no warnings and --strict lets all pass.
site: $(VENV)/site ## build the pages of docs/ into build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

dist: $(VENV)/dev ## build sdist and wheel, check them, try the wheel in a clean environment
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --no-isolation --outdir dist > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv --clear $(CLEAN)
	$(CLEAN)/bin/python $(INSTALL) torch
	$(CLEAN)/bin/python $(INSTALL) dist/*.whl
	cd / && $(CLEAN)/bin/python $(CURDIR)/tests/wheel.py

clean: ## remove environments and build output
	rm -rf .venv* build dist *.egg-info
