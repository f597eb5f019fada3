# Two commands on a fresh machine: `make demo` and `make test`. Each does all the set-up that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported, once; pip would compile thousands of modules that nobody imports
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/$(INSTALL) -c constraints.txt
# a process a core, up to four, each with one thread and whole files of tests
PYTEST := python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
unexport PYTHONDONTWRITEBYTECODE
OLDEST := .venv-oldest
NEWEST := .venv-newest
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

.PHONY: demo test test-oldest upgrade-check check bench docs clean

demo: $(READY)
	$(BIN)/normtune demo --out demo

test: $(READY_DEV)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

# the oldest torch and transformers that pyproject.toml allows; where torch has no CPU build, gigabytes of CUDA come with it
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/$(INSTALL) -c $(OLDEST)/constraints.txt 'torch==2.11.*' 'transformers==5.17.*' -e '.[dev]'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/$(PYTEST)

# every family against the newest transformers on the index: losses, first tokens, gradients and answers
upgrade-check:
	$(PYTHON) -m venv $(NEWEST)
	grep -vE '^(transformers|huggingface_hub|tokenizers|accelerate|peft)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/$(INSTALL) -c $(NEWEST)/constraints.txt torch
	$(NEWEST)/bin/$(INSTALL) --upgrade -c $(NEWEST)/constraints.txt transformers -e '.[dev]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/$(PYTEST) tests/models/families/test_families.py

check: $(READY_DEV)
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each prints a table and writes its JSON beside the script. Real data is measured where it is given:
# make bench SLAKE=DIR VQA_RAD=DIR
bench: $(READY_DEV)
	$(BIN)/normtune bench learning_rates --out benchmarks/learning_rates.json
	$(BIN)/normtune bench bf16_norms --out benchmarks/bf16_norms.json
	$(BIN)/normtune bench demo --out benchmarks/demo
ifdef SLAKE
	$(BIN)/normtune bench question_only --slake "$(SLAKE)" --vqa-rad "$(VQA_RAD)" --out benchmarks/question_only.json
	for shape in llava miss; do for data in slake vqa-rad; do \
	  if [ $$data = slake ]; then root="$(SLAKE)"; else root="$(VQA_RAD)"; fi; \
	  for name in throughput answering; do \
	    $(BIN)/normtune bench $$name --shape $$shape --data $$data --root "$$root" \
	      --out benchmarks/$${name}_$${shape}_$$data.json || exit 1; \
	done; done; done
	$(BIN)/normtune bench scaling --slake "$(SLAKE)" --out benchmarks/scaling.json
endif

docs: $(READY)
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) demo site

# torch first and alone, so that the pinned (CPU-friendly) version is what everything else resolves against
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $(READY)

$(READY_DEV): $(READY)
	$(PIP) -e '.[dev]'
	touch $(READY_DEV)
