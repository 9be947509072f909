# make caption [PHOTOS=folder]   captions photographs with the bundled model and writes captions/gallery.html
# make paper-table [TABLE=folder]  trains a small base and its graft alike, prints the field's table of both
# make test                      sets everything up and runs all tests
# make test-oldest               a core of the tests on the oldest transformers that is supported
# make lint                      ruff, as CI runs it
# make bundle                    copies the model's code beside the bundled weights, after a change of it

PYTHON ?= python3
PHOTOS ?= examples/photos
OUT ?= captions
TABLE ?= runs/paper-table
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt

.PHONY: caption paper-table test test-oldest lint bundle clean

caption: .venv/examples.ready
	$(BIN)/python examples/caption_photos.py "$(PHOTOS)" --out "$(OUT)" --some-may-fail

# one thread: beside other programs a second one waits more than it works
paper-table: .venv/table.ready
	OMP_NUM_THREADS=1 $(BIN)/python examples/paper_table.py --aspects --out "$(TABLE)"

test: .venv/test.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile

test-oldest: .venv/test.ready
	$(BIN)/python tests/versions.py --oldest

lint: .venv/lint.ready
	$(BIN)/ruff check --config .ci/ruff.toml .
	$(BIN)/ruff format --config .ci/ruff.toml --check .

bundle:
	cp $(filter-out __init__.py,$(wildcard *.py)) examples/ase-mini/

clean:
	rm -rf .venv captions

.venv/python.ready:
	$(PYTHON) -m venv .venv
	touch $@

# torch first and by its exact version: a range would fetch a build with gigabytes of GPU libraries
.venv/examples.ready: .venv/python.ready setup.cfg tests/constraints.txt
	$(INSTALL) $$(grep '^torch==' tests/constraints.txt)
	$(INSTALL) --editable '.[examples]'
	touch $@

.venv/table.ready: .venv/examples.ready
	$(INSTALL) --editable '.[training,evaluation]'
	touch $@

.venv/test.ready: .venv/examples.ready
	$(INSTALL) --editable '.[test]'
	touch $@

.venv/lint.ready: .venv/python.ready tests/constraints.txt
	$(INSTALL) ruff
	touch $@
