# `make serve`: a server with the demo tasks. `make test`: every check. Both install when needed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install serve test soak format demo-check bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Medley needs Python 3.11 or newer; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

serve: $(INSTALLED)
	$(BIN)/medley serve

test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

# The faults of tests/faults in full: 200 publishes among kills, Redis away for 30 s, 60 s of changes under 50 streams.
# One test after the other, so that the seconds they measure are their own.
soak: $(INSTALLED)
	MEDLEY_TEST_SOAK=1 $(BIN)/pytest tests/faults --numprocesses 0 --timeout 3600 --durations 10

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-check: $(INSTALLED)
	$(BIN)/python -m demo.check

# The CPU set. `make bench VLLM=path/to/env` measures vLLM too; benchmarks/vllm_peer.py says how to make its environment.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(if $(VLLM),--vllm '$(VLLM)')

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
