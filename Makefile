PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check mutants slow fuzz clean

demo: .venv/run  ## train a vision-language adapter on real pictures, from an empty machine
	$(BIN)/plait fetch stamps
	$(BIN)/plait train configs/stamps.yaml
	$(BIN)/plait report runs/stamps

test: .venv/dev check  ## ruff, mypy and the whole suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not fuzz"

check: .venv/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

mutants: .venv/dev  ## break each guarantee by one line and require a red test
	$(BIN)/python tests/mutants/run.py

fuzz: .venv/dev  ## thousands of damaged pictures: an error or an array, never a crash
	$(BIN)/python -m pytest -m fuzz -s

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

clean:
	rm -rf .venv build *.egg-info
