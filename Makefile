# make caption [PHOTOS=folder]   captions photographs with the bundled model and writes captions/gallery.html
# make test                      sets everything up and runs all tests
# make test-oldest               a core of the tests on the oldest transformers that is supported
# make lint                      ruff, as CI runs it
# make bundle                    copies the model's code beside the bundled weights, after a change of it

PYTHON ?= python3
PHOTOS ?= examples/photos
OUT ?= captions
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt

.PHONY: caption test test-oldest lint bundle clean

caption: .venv/examples.ready
	$(BIN)/python examples/caption_photos.py "$(PHOTOS)" --out "$(OUT)"

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

.venv/test.ready: .venv/examples.ready
	$(INSTALL) --editable '.[test]'
	touch $@

.venv/lint.ready: .venv/python.ready tests/constraints.txt
	$(INSTALL) ruff
	touch $@
