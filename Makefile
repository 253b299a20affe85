# make quickstart | generate | test | test-all | faults | lint | format | clean
PYTHON ?= python3
TORCH ?= torch==2.13.0
comma := ,
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
CODES ?= runs/codes
GENERATOR ?= runs/generator
# libtpu, which compiles for TPUs that are not here, exists for x86-64 Linux only.
EXTRAS := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),test$(comma)tpu,test)

.PHONY: quickstart generate test test-all faults lint format clean

quickstart: $(VENV)/runtime
	$(BIN)/python -m fvq_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR)

# Everything that is there already is used, and what was interrupted goes on.
generate: $(WORKDIR)/report/index.html
	$(BIN)/python -m fvq_jax.tokenize extract --tokenizer=$(WORKDIR) --data=photos --size=32 --crops=random:4 --out=$(CODES)/train
	$(BIN)/python -m fvq_jax.tokenize extract --tokenizer=$(WORKDIR) --data=photos --size=32 --split=eval --out=$(CODES)/held_out
	$(BIN)/python -m fvq_jax.main --config=configs/generate.py --workdir=$(GENERATOR) --config.data.tokenizer=$(WORKDIR) \
		--config.data.train_dir=$(CODES)/train --config.data.eval_dir=$(CODES)/held_out

$(WORKDIR)/report/index.html:
	$(MAKE) quickstart

test: $(VENV)/test
	$(BIN)/python -m pytest -n 3 --dist loadfile

# With the tests that are marked slow.
test-all: $(VENV)/test
	$(BIN)/python -m pytest -n 3 --dist loadfile -m ""

faults: $(VENV)/test
	FAULTS=all $(BIN)/python -m pytest -n 0 -m "" tests/faults

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/runtime: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/test: pyproject.toml Makefile $(VENV)/runtime
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet --no-deps lpips==0.1.4  # for the trained heads in it; torchvision stays out
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
