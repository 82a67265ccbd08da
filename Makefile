# Every target is enough on a fresh clone: what it needs is set up first.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo demo-rescue test test-transformers4 lint bench benchmark-smoke gpu wheel-test
.DEFAULT_GOAL := setup

setup: $(VENV)/.installed  ## the environment of the tests, in .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed (looked for python3.11, python3, python); PYTHON=... names it"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,transformers,dev]"
	@# An oracle of the tests, without what it asks for and they do not use: torchvision, whose build for GPUs would come.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt curvlinops-for-pytorch einconv linear_operator opt_einsum
	@# A peer, for the bench alone.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt moewatch
	@touch $@

demo: setup  ## train a small MoE language model on real text, with geometry
	$(BIN)/python -m trainers.train experiment=demo

demo-rescue: setup  ## a run that is made to collapse and is repaired, beside the same run without the controller
	$(BIN)/python -m trainers.rescue

test: setup  ## the quick suite, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-transformers4: setup  ## the families of transformers 4.57, in a folder of its own (build/transformers4)
	$(BIN)/python -m pytest -m slow tests/integrations/test_transformers4.py

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## speed, as ratios measured side by side
	$(BIN)/python -m trainers.speed

benchmark-smoke: setup  ## the benchmark at toy size, a minute: that every arm is tuned, trained and reported
	$(BIN)/python -m trainers.benchmark smoke

gpu: setup  ## what waits for an accelerator: its tests and the same ratios there
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "make gpu: no CUDA device here (this torch is $$($(BIN)/python -c 'import torch; print(torch.__version__)'))"; exit 2; }
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m trainers.speed --device cuda

wheel-test: setup  ## the wheel alone, without extras, in a clean environment: README's example runs there
	rm -rf dist build/wheel-env build/empty
	$(BIN)/python -m build --quiet --wheel
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	mkdir -p build/empty
	cd build/empty && ../wheel-env/bin/python ../../tests/readme_example.py ../../README.md
