# Targets: demo test check golden results bench tables setup clean. The set-up lives in .venv and is made again when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
# Idle OpenMP threads spin; beside other work that costs more than the tests themselves.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
CODE := $(wildcard src tests benchmarks scripts)

.PHONY: demo test check golden results bench tables setup clean

setup: .venv/.ok

.venv/.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m slimtune tune recipes/demo.yaml out=runs/demo --overwrite

test: setup check
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

# Record the golden losses again; look at the difference before you commit it.
golden: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -n 0 tests/golden --record
	git diff --stat -- tests/golden

# The tables and figures of docs/RESULTS.md and docs/results/FIGURES.md, from the raw rows in docs/results/. What makes new rows stands beside each table.
results: setup
	$(BIN)/python benchmarks/results.py docs/RESULTS.md docs/results/FIGURES.md docs/results/EARLIER.md

# What claims of cost are made of, at a size for a CPU, as ratios in one process each (several GPUs' stand-ins: processes of one run).
SMALL := cpu-size --batch 2 --window 64
bench: setup
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/cost.py $(SMALL) --steps 80 --search 4 --prior 2
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/growth.py $(SMALL)
	$(BIN)/python benchmarks/scale.py $(SMALL) --processes 2 --prior 16 --search 2 --recover 4 \
	  model.dtype=float32 train.precision=float32
	$(BIN)/python benchmarks/compiling.py $(SMALL) --layers 12 --steps 4 --backend aot_eager
	$(BIN)/python benchmarks/small_updates.py $(SMALL) --layers 8 --seeds 0
	$(BIN)/python benchmarks/loading.py small --only load
	$(BIN)/python benchmarks/startup.py

# All tables on the screen, the earlier ones too (docs/results/EARLIER.md).
GRIDS := $(addprefix docs/results/,$(addsuffix .json,python-docs health-docs legal-docs health-docs-earlier))
tables: setup
	@for rows in $(GRIDS); do echo; echo $$rows; $(BIN)/python benchmarks/grid.py --rows $$rows || exit 1; done
	@for rows in $(filter-out $(GRIDS) %dry-run.json %crosscheck.json %lm-eval.json %lm-eval-44m.json %speed.json %decode-ways.json %cost.json %growth.json %compiling.json %loading.json %locking.json %scale.json %small-updates.json %startup.json %tomoe-caught.json %tomoe-fits.json %tomoe-gguf.json %tomoe-probes.json %tomoe-routing.json %tomoe-speed.json,$(wildcard docs/results/*.json)); do \
	  echo; echo $$rows; $(BIN)/python -m slimtune compare --table --rows $$rows || exit 1; done
	@echo; echo docs/results/speed.json; $(BIN)/python benchmarks/speed.py --rows docs/results/speed.json
	@echo; echo docs/results/decode-ways.json; $(BIN)/python benchmarks/decode_ways.py --rows docs/results/decode-ways.json
	@for what in cost compiling growth locking scale loading; do echo; echo docs/results/$$what.json; $(BIN)/python benchmarks/$$what.py --rows docs/results/$$what.json; done
	@echo; echo docs/results/small-updates.json; $(BIN)/python benchmarks/small_updates.py --rows docs/results/small-updates.json
	@echo; echo docs/results/startup.json; $(BIN)/python benchmarks/startup.py --table --rows docs/results/startup.json
	@test ! -f docs/results/tomoe-speed.json || { echo; echo docs/results/tomoe-speed.json; $(BIN)/python benchmarks/tomoe_speed.py --rows docs/results/tomoe-speed.json; }
	@test ! -f docs/results/tomoe-gguf.json || { echo; echo docs/results/tomoe-gguf.json; $(BIN)/python benchmarks/tomoe_gguf.py --rows docs/results/tomoe-gguf.json; }
	@echo; echo docs/results/dry-run.json; $(BIN)/python benchmarks/dry_run.py --rows docs/results/dry-run.json

# Caches and builds; .venv and runs/ stay.
clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
