# make demo   complete and infill Python code with the bundled checkpoint
# make test   the whole test suite
# make lint   style and types
# make check-kernels   compile the kernels for every supported GPU, with two versions of Triton;
#                      no GPU is needed. ARGS="--json FILE" also writes the tables to a file
PYTHON ?= python3
BIN = .venv/bin
# Named after the version of Python, so that another PYTHON makes a new .venv.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED = .venv/installed-$(VERSION)
PIP = $(BIN)/python -m pip --disable-pip-version-check
# On Linux PyPI's torch brings CUDA. Without a GPU, PyTorch's own index has a build for CPUs, a tenth
# of the size; it is used where pip is left at PyPI.
CPU_INDEX = https://download.pytorch.org/whl/cpu
CPU_TORCH := $(shell command -v nvidia-smi >/dev/null || test "$$(uname)" != Linux \
	|| $(PYTHON) -m pip config list 2>/dev/null | grep -q index || test "$$PIP_INDEX_URL" || echo yes)
# The oldest Triton that the kernels are for, beside the one that constraints.txt pins.
OLD_TRITON = 3.6.0
OLD_TRITON_PATH = .venv/triton-$(OLD_TRITON)

.PHONY: demo test lint check-kernels clean

demo: $(INSTALLED)
	@$(BIN)/python scripts/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-kernels: $(OLD_TRITON_PATH)/installed
	$(BIN)/python scripts/check_kernels.py $(ARGS)
	PYTHONPATH=$(OLD_TRITON_PATH) $(BIN)/python scripts/check_kernels.py $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mqa-gpt needs Python 3.11 or later; this is " + sys.version.split()[0])'
	@echo "Installing into .venv; this takes some minutes, later runs start at once"
	@test -x $(BIN)/python$(VERSION) || $(PYTHON) -m venv --clear .venv
	-$(if $(CPU_TORCH),$(PIP) install --no-deps -c constraints.txt --index-url $(CPU_INDEX) torch)
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(OLD_TRITON_PATH)/installed: $(INSTALLED)
	$(PIP) install --no-deps --upgrade \
		--target $(OLD_TRITON_PATH) triton==$(OLD_TRITON)
	@touch $@

clean:
	rm -rf .venv build *.egg-info
