# make run   set up .venv and run the main job: trace, train, deploy      make test   same set-up, then lint, types, tests
# make gpu   what only a GPU can show, in one folder under docs/results   make peers  other projects' own code and tests
# make bench   all that two CPU cores can show, in one folder       make bench-settings  the same in other settings
# make bench-long   three seeds, more models: hours                 make stress   random cases: docs/reliability.md
# make docs   the documentation as a site in outputs/site            make page-commands   runs what the pages say
PYTHON ?= python3
BIN := .venv/bin
PREDICTOR := outputs/predictor
# Every start would compile thousands of modules anew without their cached bytecode.
export PYTHONDONTWRITEBYTECODE :=

# What a second core does meanwhile: train.py's packages are compiled to bytecode, and the network's kernels, while the
# trace is collected; the kernels of planner and layer while the predictor trains. Later runs find all of it cached.
IMPORTS := import train; from predictor.recurrence import compile_kernels; compile_kernels()
KERNELS := from runtime.balancing import balancer; from runtime.experts import dispatch; \
	balancer.compile_kernels(); dispatch.compile_kernels()

.PHONY: run test smoke docs gpu bench bench-long bench-settings page-commands peers peers-engines peers-transformers stress clean

run: .venv/ready
	@if [ -e $(PREDICTOR)/config.json ]; then \
		echo "Reusing the predictor in $(PREDICTOR); remove it to train again"; \
	else \
		$(BIN)/python -c "$(IMPORTS)" & $(BIN)/python -m data.collect >/dev/null && \
		{ $(BIN)/python -c "$(KERNELS)" & $(BIN)/python train.py --predictor $(PREDICTOR); }; \
	fi
	@$(BIN)/python -m runtime.infer --predictor $(PREDICTOR)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The main job in little, for CI and for a first look.
smoke: .venv/ready
	rm -rf outputs/smoke
	$(BIN)/python train.py --config configs/smoke.yaml
	$(BIN)/python -m runtime.infer --predictor outputs/smoke/predictor --batches 4 --out outputs/smoke/infer
	$(BIN)/python -m pytest tests/runtime/gpu/test_trained_predictor.py

# Tests, exactness, benchmarks and sanitizers on all GPUs; outputs/predictor is trained first if it does not exist.
gpu: .venv/ready
	@$(BIN)/python -m benchmarks.gpu

# Benchmarks for two CPU cores, in one folder under docs/results; about half an hour, the training of a predictor included.
bench: .venv/ready
	@$(BIN)/python -m benchmarks.bench

# Three seeds, the decoder-only model, a model larger than memory: one to two hours, and 35 GB of disk.
bench-long: .venv/ready
	@$(BIN)/python -m benchmarks.bench_long

# Layers, memory budgets, recorded loads and GPUs' times in other settings: half an hour.
bench-settings: .venv/ready
	@$(BIN)/python -m benchmarks.bench_settings

# Both parts run, whichever fails. peers-engines: SGLang's and vLLM's own placement code reads our plans and carries out
# our moves; the pinned wheels are unpacked into outputs/peers. peers-transformers: transformers' own tests of three
# families with an engine around every model; TRANSFORMERS=FOLDER takes a clone that is there, else the installed
# version's tag is cloned into outputs/transformers.
TRANSFORMERS ?= outputs/transformers
peers: .venv/ready
	@status=0; for part in engines transformers; do $(MAKE) --no-print-directory peers-$$part || status=1; done; exit $$status

peers-engines: .venv/ready
	@$(BIN)/python -m benchmarks.peer_engines

peers-transformers: .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check parameterized==0.9.0
	@$(BIN)/python -m benchmarks.peers --transformers $(TRANSFORMERS)

# 100,000 random cases against the plain loop over experts; faults and the hour's soak are commands of their own.
stress: .venv/ready
	@$(BIN)/python -m stress.exactness
	@$(BIN)/python -m stress.fuzz

# Every command of README and docs, a quarter of an hour; what needs an account, a hub or more machines is left out.
page-commands: .venv/ready
	@PAGES=all $(BIN)/python -m pytest tests/test_page_commands.py

# A warning is an error. Without network; open outputs/site/index.html.
docs: .venv/ready
	@$(BIN)/python -m sphinx -qW --keep-going -E -c docs -d outputs/site.trees . outputs/site
	@echo "outputs/site/index.html"

# uv installs in a fifth of pip's time; where it cannot be had, pip does the same. The stamp is written last, so that a
# set-up that was interrupted starts over.
.venv/ready: requirements-cpu.lock pyproject.toml setup.py
	@echo "Setting up .venv (about a minute)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 2>/dev/null && \
		$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-cpu.lock || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-cpu.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv outputs
