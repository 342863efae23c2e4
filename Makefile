PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_OUTSIDE := .venv-outside/.installed
EXTRAS := tests,plots,render,progress,export,zoo,docs
PACKAGES := sb3_mpg sb3_mpg_envs
SOURCES := sb3_mpg sb3_mpg_envs hyperparams benchmarks docs tests setup.py
# Short benchmarks first; the last ones take days
BENCHMARKS := benchmarks/simulators.py benchmarks/zoo_hook.py benchmarks/speed.py benchmarks/learned_speed.py \
	"benchmarks/learners.py throughput" benchmarks/learning.py benchmarks/learning_report.py benchmarks/bound.py benchmarks/trust.py \
	benchmarks/trust_report.py benchmarks/without_model.py
ALGO ?= mpg
ENV ?= PathTracking-v0
# One update for each step
STEPS ?= 5000
N_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv train pictures test test-oldest docs lint type format commit-checks outside benchmark clean

help: ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

venv: $(STAMP) ## create .venv and install the library with its tools, at the tested versions

$(STAMP): setup.py .ci/constraints.txt
	@echo "Installing sb3-mpg and its tools into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

train: $(STAMP) ## train MPG on path tracking (ALGO= ENV= STEPS=), print its evaluation, save the agent and a picture
	OMP_NUM_THREADS=1 $(BIN)/python -m rl_zoo3.train --algo $(ALGO) --env $(ENV) -n $(STEPS) -f logs -P --verbose 0 \
		--eval-freq 500 --eval-episodes 5 --eval-env-kwargs early_reset:False
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluate.py --algo $(ALGO) --env $(ENV) -f logs

pictures: $(STAMP) ## draw the pictures of README and docs with the newest agent on path tracking (make train), and all figures
	OMP_NUM_THREADS=1 MUJOCO_GL=$${MUJOCO_GL-egl} $(BIN)/python benchmarks/pictures.py --algo $(ALGO) -f logs
	$(BIN)/python benchmarks/learning_report.py > /dev/null
	$(BIN)/python benchmarks/trust_report.py > /dev/null

test: $(STAMP) ## run the tests (all but those marked expensive)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(N_WORKERS) --dist worksteal --durations=15

test-oldest: ## run the tests with the oldest versions of SB3, RL Zoo, Gymnasium and MuJoCo that setup.py allows
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints-oldest.txt \
		-e '.[zoo,render,export]' pytest pytest-xdist filelock build setuptools
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(N_WORKERS)

docs: $(STAMP) ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

lint: $(STAMP) ## check style with ruff and black
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/black --check --quiet --diff $(SOURCES)

type: $(STAMP) ## check types with mypy
	$(BIN)/mypy $(PACKAGES)

format: $(STAMP) ## format the code and fix style errors
	$(BIN)/ruff check --fix --quiet $(SOURCES) || true
	$(BIN)/black --quiet $(SOURCES)

# One after the other, also under make -j: the formatter writes files that the others read
commit-checks: ## format, lint, type, test, build the documentation
	@for target in format lint type test docs; do $(MAKE) --no-print-directory $$target || exit 1; done

# An environment of its own: dm_control needs an older MuJoCo
outside: $(STAMP_OUTSIDE) ## create .venv-outside for benchmarks/outside, with the packages whose tasks it runs

$(STAMP_OUTSIDE): setup.py .ci/constraints-outside.txt
	@$(PYTHON) -m venv .venv-outside
	@.venv-outside/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints-outside.txt -e '.[outside]'
	@touch $@

benchmark: $(STAMP) $(STAMP_OUTSIDE) ## run all benchmarks (days; complete runs are skipped)
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done
	.venv-outside/bin/python benchmarks/outside/run.py --jobs 2
	.venv-outside/bin/python benchmarks/outside/report.py

clean: ## remove the virtual environment, caches and build products
	rm -rf $(VENV) .venv-oldest .venv-outside build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
