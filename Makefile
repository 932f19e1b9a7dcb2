# make demo   complete and infill Python code with the bundled checkpoint
# make test   the whole test suite
# make lint   style and types
# make check-kernels   compile the kernels for every supported GPU, with two versions of Triton;
#                      no GPU is needed. ARGS="--json FILE" also writes the tables to a file
PYTHON ?= python3
BIN = .venv/bin
# Named after the version of Python, so that another PYTHON makes .venv anew.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED = .venv/installed-$(VERSION)
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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(OLD_TRITON_PATH)/installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(OLD_TRITON_PATH) triton==$(OLD_TRITON)
	@touch $@

clean:
	rm -rf .venv build *.egg-info
