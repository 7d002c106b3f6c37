# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := build/demo
# Two processes of one thread each: more threads than cores would only wait for each other. A file's tests go to one of
# them, so that what they share is made once.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: install demo test test-all test-quantization test-demo test-oldest serve torture style check audit docs release bench study clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# An image of two-stage samples from the checkpoint in the repository: outputs/demo.png. One thread is enough for it.
demo: install
	OMP_NUM_THREADS=1 $(BIN)/python examples/quickstart.py --output outputs/demo.png

test: install
	$(PYTEST)

# All tests with the newest versions (constraints.txt), those that need torchao or a browser, and the quick ones with the
# oldest versions (constraints-oldest.txt).
test-all: install
	$(PYTEST) -m "not gpu"
	$(MAKE) test-quantization test-demo test-oldest

# Diffusers imports torchao wherever it is installed, which takes two seconds and prints warnings: so not in $(VENV).
test-quantization: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target build/torchao torchao
	PYTHONPATH=build/torchao $(PYTEST) -m "not gpu" \
		tests/test_model_features.py tests/test_docs.py tests/training/test_cost.py \
		tests/training/test_trainer_options.py::test_moments_of_8_bits

# The demo in Chromium, that of the system (apt-get install chromium) or else Playwright's. Gradio does not admit the newest
# Pillow yet: so it is not in $(VENV). DEMO_IMAGES=docs/images writes the images of docs/demo.md.
test-demo: $(DEMO)/.installed
	command -v chromium > /dev/null || PYTHONPATH=$(DEMO) $(BIN)/python -m playwright install chromium
	PYTHONPATH=$(DEMO) $(PYTEST) -m "not gpu" tests/demo

# The demo of the checkpoint in the repository: http://127.0.0.1:7860
serve: $(DEMO)/.installed
	PYTHONPATH=$(DEMO) $(BIN)/python -m diffusers_dod.demo

$(DEMO)/.installed: $(INSTALLED)
	mkdir -p $(DEMO)
	grep -v "^pillow==" constraints.txt > $(DEMO)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(DEMO)/constraints.txt --upgrade --target $(DEMO) \
		gradio playwright
	touch $@

# The quick tests with the oldest versions that pyproject.toml admits. Their torch has CUDA's libraries: 4 GB.
test-oldest:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	$(subst $(BIN),$(VENV)-oldest/bin,$(PYTEST))

# Faults of every kind against the real commands, and their table (docs/reliability.md); exit code 1 if anything is lost.
# Some rows: make torture ROWS="kill disk". Root also fills up disks and cuts their power.
torture: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/torture $(ROWS)

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ruff refuses pickles and what reads them (pyproject.toml); so does the last line, where it cannot look.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	! grep -rnE --include=*.py "weights_only ?= ?False|allow_pickle ?= ?True" src training examples benchmarks docs

# Known vulnerabilities of the pinned versions. Before a release: it asks PyPI, and fails if a package is not known there.
audit:
	test -x $(VENV)-audit/bin/python || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# The site of the documentation, with the reference of all names and options: outputs/docs/index.html.
docs: install
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --strict

# Checks, builds (dist/), installs and tags a release; `make release OPTIONS=--dry_run` does without clean tree, version and tag.
release: install
	$(BIN)/python .ci/release.py $(OPTIONS)

# Times against peers, in one table with the results to compare with; it goes on where it was stopped.
bench: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/bench.py

# The runs, results, tables and plots of docs/study.md: about a day of one core, and resumes where it stopped.
study: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python training/study/study.py train
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python training/study/study.py evaluate
	$(BIN)/python training/study/report.py

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-audit build dist src/*.egg-info
