# make demo   complete and infill Python code with the bundled checkpoint
# make test   the whole test suite
# make test-fast   without the tests marked slow: about a minute
# make fuzz   100,000 changed files, prompts, options and hub answers, and races and kills of saving;
#             FUZZ=N for another number of inputs of each kind
# make lint   style and types
# make check-kernels   compile the kernels for every supported GPU with two versions of Triton, and
#                      for sm_90 with a newer assembler than theirs; interpret what is compiled for
#                      sm_90; no GPU is needed.
#                      ARGS="--json FILE" also writes the tables to a file
# make docs   the site, in docs/_build/html; runs the lessons, and fails on a warning.
#             LESSONS=cache runs only those whose text has changed
# make lessons   the lessons as Jupyter notebooks, in docs/notebooks
PYTHON ?= python3
BIN = .venv/bin
# Named after the version of Python, so that another PYTHON makes a new .venv.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED = .venv/installed-$(VERSION)
PIP = $(BIN)/python -m pip --disable-pip-version-check
# Where torch comes from, if not from pip's own index. On Linux that one has a build for GPUs, ten
# times the size of the build for CPUs: "Get started" on PyTorch's site names the index of the latter.
TORCH_INDEX ?=
# Inputs of each of the seventeen kinds in `make fuzz`.
FUZZ ?= 6000
# Which lessons `make docs` runs.
LESSONS ?= force
# The oldest Triton that the kernels support, besides the one that constraints.txt pins.
OLD_TRITON = 3.6.0
OLD_TRITON_PATH = .venv/triton-$(OLD_TRITON)
# The assembler that NVIDIA ships itself; those in these Tritons are 12.8.93.
NEW_PTXAS = 13.5.37
NEW_PTXAS_PATH = .venv/ptxas-$(NEW_PTXAS)

.PHONY: demo test test-fast fuzz lint check-kernels docs lessons clean

demo: $(INSTALLED)
	@$(BIN)/python scripts/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

fuzz: $(INSTALLED)
	MQA_GPT_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m fuzz

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-kernels: $(OLD_TRITON_PATH)/installed $(NEW_PTXAS_PATH)/installed
	$(BIN)/python scripts/check_kernels.py $(ARGS)
	PYTHONPATH=$(OLD_TRITON_PATH) $(BIN)/python scripts/check_kernels.py $(ARGS)
	TRITON_PTXAS_PATH=$(NEW_PTXAS_PATH)/nvidia/cu13/bin/ptxas \
		$(BIN)/python scripts/check_kernels.py --arch 90 $(ARGS)
	MQA_GPT_PTX=all $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/ptx
	MQA_GPT_PTX=all PYTHONPATH=$(OLD_TRITON_PATH) \
		$(BIN)/python -m pytest -n 2 --dist worksteal -q tests/ptx

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -c docs . docs/_build/html -D nb_execution_mode=$(LESSONS) \
		--fresh-env --fail-on-warning --keep-going --quiet
	@echo "Open docs/_build/html/index.html"

lessons: $(INSTALLED)
	@$(BIN)/python scripts/notebooks.py docs/notebooks

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mqa-gpt needs Python 3.11 or later; this is " + sys.version.split()[0])'
	@echo "Installing into .venv; this takes some minutes, later runs start at once"
	@command -v nvidia-smi >/dev/null || test -n "$(TORCH_INDEX)" || echo "No GPU here: make TORCH_INDEX=URL takes PyTorch's smaller build for CPUs from the index that its site names"
	@test -x $(BIN)/python$(VERSION) || $(PYTHON) -m venv --clear .venv
	$(if $(TORCH_INDEX),$(PIP) install --no-deps -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(PIP) install -c constraints.txt -e '.[test,docs]'
	@touch $@

$(OLD_TRITON_PATH)/installed: $(INSTALLED)
	$(PIP) install --no-deps --upgrade \
		--target $(OLD_TRITON_PATH) triton==$(OLD_TRITON)
	@touch $@

$(NEW_PTXAS_PATH)/installed: $(INSTALLED)
	$(PIP) install --no-deps --upgrade \
		--target $(NEW_PTXAS_PATH) nvidia-cuda-nvcc==$(NEW_PTXAS)
	@touch $@

clean:
	rm -rf .venv build docs/_build docs/notebooks *.egg-info
