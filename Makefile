PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check mutants slow fuzz gpu hopper peers recipes cookbook clean

# Where it is set, each process that a test starts would compile all that it imports again: an engine
# takes 15 seconds to start, and not 6.
unexport PYTHONDONTWRITEBYTECODE

# Versions of the official Tinker client that tests/service runs unchanged against `plait serve`.
TINKER := 0.25.0 0.31.0 0.38.0

demo: .venv/run  ## train a vision-language adapter on real pictures, from an empty machine
	$(BIN)/plait fetch stamps
	$(BIN)/plait train configs/stamps.yaml
	$(BIN)/plait report runs/stamps

test: .venv/dev .venv/tinker check  ## ruff, mypy and the whole suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not fuzz"

check: .venv/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/dev .venv/tinker .venv-cookbook/ready  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

mutants: .venv/dev  ## break each guarantee by one line and require a red test
	$(BIN)/python tests/mutants/run.py

fuzz: .venv/dev  ## thousands of damaged media files: an error or an array, never a crash
	$(BIN)/python -m pytest -m fuzz -s

gpu:  ## the kernels' tests and every GPU benchmark, with this machine's own Python and torch
	$(PYTHON) -m benchmarks.gpu

hopper: .venv/run  ## compile every kernel for a Hopper chip, without one: registers, spills, memory
	$(BIN)/python -m benchmarks.hopper

peers: .venv-peers/ready  ## what benchmarks.loader and benchmarks.logprobs measure against

cookbook: .venv-cookbook/ready  ## what tests/service/test_cookbook.py runs the Tinker cookbook in

recipes: .venv/recipes  ## every recipe that must reach a number, with three seeds; runs/recipes
	$(BIN)/plait fetch plaited
	$(BIN)/plait fetch preferences
	$(BIN)/python -m benchmarks.recipes --seeds 0 1 2

.venv-peers/ready: constraints.txt benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --no-compile -c constraints.txt -r benchmarks/peers/requirements.txt
	touch $@

# One environment, made once and brought up to date when its description changes. Byte-compiling
# six gigabytes takes longer than compiling what is imported, hence --no-compile.
.venv/base:
	$(PYTHON) -m venv .venv
	touch $@

.venv/run: .venv/base pyproject.toml constraints.txt
	$(BIN)/python -m pip install --no-compile --progress-bar on -c constraints.txt -e .
	touch $@

.venv/dev: .venv/base pyproject.toml constraints.txt
	$(BIN)/python -m pip install --no-compile --progress-bar on -c constraints.txt -e '.[dev]'
	touch $@ .venv/run

# The client's versions cannot lie beside each other, so each has a folder of its own, which only the
# scripts of tests/service/tinker_scripts see; what they need besides is in .venv already.
.venv/tinker: .venv/base Makefile
	for version in $(TINKER); do \
		rm -rf .venv/tinker-$$version; \
		$(BIN)/python -m pip install --no-compile --no-deps --target .venv/tinker-$$version tinker==$$version || exit 1; \
	done
	touch $@

# What the Tinker cookbook needs lies in .venv-cookbook; torch, transformers and whatever else fits
# are those of .venv, whose site-packages come behind: six gigabytes less to install.
.venv-cookbook/ready: .venv/dev constraints.txt tests/service/cookbook/requirements.txt
	$(PYTHON) -m venv .venv-cookbook
	for folder in .venv-cookbook/lib/python*/site-packages; do \
		echo ../../../../.venv/lib/$$(basename $$(dirname $$folder))/site-packages > $$folder/behind.pth; \
	done
	.venv-cookbook/bin/python -m pip install --no-compile -c constraints.txt -r tests/service/cookbook/requirements.txt
	.venv-cookbook/bin/python -m pip install --no-compile --no-deps tinker-cookbook==0.6.1
	touch $@

.venv/recipes: .venv/base pyproject.toml constraints.txt
	$(BIN)/python -m pip install --no-compile --progress-bar on -c constraints.txt -e '.[recipes]'
	touch $@ .venv/run

clean:
	rm -rf .venv .venv-cookbook .venv-peers build *.egg-info
