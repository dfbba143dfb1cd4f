# Every target makes .venv itself when it is missing or out of date (scripts/venv).
DEVICE_MEMORY ?= 640Mi
FUNCTIONS ?= examples/functions.yaml
NAME ?= node

.PHONY: help run serve test check bench clean

help:
	@echo "make run     serve real models in $(DEVICE_MEMORY) of device memory, load them for 30 s, check every answer"
	@echo "make serve   the same functions, until interrupted"
	@echo "make test    the tests        make check  format, lint, types, layers"
	@echo "make bench   a benchmark (NAME=$(NAME); scripts/bench --list names them)"
	@echo "make clean   remove .venv, caches and build folders"

run: .venv/.made
	.venv/bin/sluice up $(FUNCTIONS) --device-memory $(DEVICE_MEMORY) --demo 30

serve: .venv/.made
	.venv/bin/sluice up $(FUNCTIONS) --device-memory $(DEVICE_MEMORY)

test: .venv/.made
	scripts/test

check: .venv/.made
	scripts/check

bench: .venv/.made
	scripts/bench $(NAME)

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.made: pyproject.toml constraints.txt
	scripts/venv
