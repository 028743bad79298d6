# Two commands: `make demo` shows what onnxsched does, `make test` is the gate that CI runs.
# Each makes its own .venv and installs everything it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check clean

demo: $(INSTALLED)
	mkdir -p demo
	$(BIN)/python -m sample_models googlenet -o demo/googlenet.onnx
	$(BIN)/onnxsched optimize demo/googlenet.onnx -o demo/scheduled.onnx
	$(BIN)/onnxsched inspect demo/scheduled.onnx
	$(BIN)/onnxsched bench demo/scheduled.onnx --original demo/googlenet.onnx
	$(BIN)/onnxsched verify demo/scheduled.onnx demo/googlenet.onnx

test: check
	$(BIN)/pytest -n auto --dist worksteal --ignore tests/gpu
	$(BIN)/pytest tests/gpu

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
