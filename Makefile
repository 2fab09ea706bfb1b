# `make figures` and `make test` do all the set-up they need. Everything runs inside .venv.
PYTHON ?= python3
CORES ?= all
MODEL ?= llama-code
DATASET ?= python
BIN := .venv/bin

.PHONY: figures test setup report verify serve bench lint format dry-run clean help

figures: setup ## run the default study to every figure and table
	$(BIN)/snakemake --cores $(CORES) figures

test: setup ## run the tests (no network, no GPU)
	$(BIN)/python -m pytest

setup: ## install what is needed into .venv
	@$(PYTHON) envs/setup.py

report: figures ## one HTML page with every figure and table
	$(BIN)/snakemake --report report.html

verify: setup ## whether results and their sources are as their manifests record
	@$(BIN)/python -m greencode.manifest verify

serve: setup ## completions of MODEL on DATASET for editors, on 127.0.0.1:8000
	$(BIN)/python -m greencode.serve --study config/config.yaml --model $(MODEL) --dataset $(DATASET) --on-long-input truncate

bench: setup ## what early exit costs, against its peers; half an hour
	$(BIN)/python -m benchmarks

lint: setup ## style and workflow checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

format: setup ## put code and rules into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

dry-run: setup ## what would run, and why
	$(BIN)/snakemake --cores $(CORES) --dry-run figures

clean: ## delete results and logs, keep .venv
	rm -rf results logs .snakemake
	find . -path './benchmarks/*.tsv' -delete

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'
