# demo: the whole recipe in miniature    test: the tests    check: style, types, layers, generated files
# chaos: kills a training at random    slurm: the miniature as SLURM jobs, and jobs disturbed    bench: the kernels
# clean: remove the environment, the caches and the miniature's results (no other run's)
.PHONY: demo test chaos slurm check bench clean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := demo

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := results/$(shell sed -n 's/^run: *\([^ ]*\).*/\1/p' config/tiny.yaml)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

SNAKEMAKE := snakemake --profile profiles/local
# Locks that a killed snakemake left behind are lifted. That is safe here because the kernel's own lock, which dies with
# its holder, keeps a second demo out; `--close` keeps it from being inherited by a trainer that outlives snakemake.
DEMO := if compgen -G '.snakemake/locks/*' > /dev/null; then $(SNAKEMAKE) --unlock; fi; $(SNAKEMAKE) all

demo: $(INSTALLED)
	mkdir -p results
	flock --close --nonblock --conflict-exit-code 75 results/.demo.lock bash -euo pipefail -c "$(DEMO)" \
		|| { code=$$?; [ $$code != 75 ] || echo 'Another `make demo` is running in this folder.' >&2; exit $$code; }
	vlm report summary --table $(RUN)/scores/table.csv --report $(RUN)/report.html --gallery $(RUN)/report/gallery.html

test: $(INSTALLED)
	pytest -n 2 --dist worksteal tests
	OMP_NUM_THREADS=1 pytest -m slurm tests/slurm

# Ten kills in each stage, on one rank and on two. VLM_CHAOS_SEED=<seed> repeats an earlier run.
chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 pytest -m chaos -s tests/chaos

# Needs root and the packages slurm-wlm and munge, else it is skipped: a cluster of virtual nodes on this machine.
slurm: $(INSTALLED)
	OMP_NUM_THREADS=1 pytest -m 'slurm or slurm_long' tests/slurm

check: $(INSTALLED)
	ruff check
	ruff format --check
	snakefmt --check workflow
	snakemake --lint
	mypy
	lint-imports
	python workflow/scripts/config_schema.py --check

bench: $(INSTALLED)
	@[ -d kernels/benches ] || { echo 'There are no kernel benches yet.' >&2; exit 1; }
	pytest kernels/benches

clean:
	rm -rf $(VENV) $(RUN) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .benchmarks *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Installed once, and again when the lock or the project's own metadata change.
$(INSTALLED): requirements/cpu.txt pyproject.toml | $(VENV)/bin/python
	@echo 'Installing into $(VENV): about two minutes.'
	$(VENV)/bin/python -m pip install --quiet --requirement requirements/cpu.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
