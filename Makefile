# make demo   complete and infill Python code with the bundled checkpoint
# make test   the whole test suite
# make lint   style and types
# make check-kernels   compile the kernels for every supported GPU; none is needed
PYTHON ?= python3
BIN = .venv/bin
# Named after the version of Python, so that another PYTHON makes .venv anew.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED = .venv/installed-$(VERSION)

.PHONY: demo test lint check-kernels clean

demo: $(INSTALLED)
	@$(BIN)/python scripts/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-kernels: $(INSTALLED)
	$(BIN)/python scripts/check_kernels.py

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mqa-gpt needs Python 3.11 or later; this is " + sys.version.split()[0])'
	@echo "Installing into .venv; this takes some minutes, later runs start at once"
	@test -x $(BIN)/python$(VERSION) || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
