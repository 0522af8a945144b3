# make demo       set up .venv and train the demonstration on two CPU ranks
# make lint       format, lint, types and the import contract
# make check      those and the unit tests: before each commit
# make test       set up .venv and run the tests
# make e2e        whole runs as a user starts them: in Slurm, over a bad network, killed and stopped
# make soak       the long tests: many kills, many switches, errors put into the code, the oldest torch and transformers
# make gpu-check  the tests that need a GPU, every option, family and command once, and the standing benchmark
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH_FOR_CPU := https://download.pytorch.org/whl/cpu
CONSTRAINTS := constraints.txt
# Two files of tests at a time, each test and rank on one thread: more threads than cores wait for each other. Byte code
# is written: each Python that a test starts would compile the program anew.
TESTS = env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
ORDINARY = -m "not e2e and not soak"
GPU_CHECK ?= gpu_check.json
RUN_DIR ?= runs/demo_$(shell date +%Y-%m-%d_%H-%M-%S)

# The first Python of at least 3.11 that can make virtual environments; PYTHON=... chooses another.
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.14 python; do \
	$$name -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

.PHONY: demo lint check test e2e soak oldest numbers gpu-check install

demo: $(INSTALLED)
	$(BIN)/lisa-dist train parallel.nproc_per_node=2 run.dir=$(RUN_DIR)
	$(BIN)/lisa-dist report run.dir=$(RUN_DIR)
	@echo
	@echo "Next, with a model and data of your own (docs/quickstart.md):"
	@echo "  source $(BIN)/activate"
	@echo "  lisa-dist init my.yaml model.path=DIR data.path=FILE.json"
	@echo "  lisa-dist train my.yaml"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(TESTS) $(ORDINARY) tests/config tests/data tests/method/optim tests/method/sampling tests/runtime

test: $(INSTALLED)
	$(TESTS) $(ORDINARY)

e2e: $(INSTALLED)
	$(TESTS) -m e2e

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak --timeout=0
	$(MAKE) oldest

# Numbers, storage and resume with the oldest versions that are supported.
oldest:
	sed -e 's/^torch==.*/torch==2.11.0/' -e 's/^transformers==.*/transformers==5.17.0/' \
		-e 's/^huggingface_hub==.*/huggingface_hub<2/' constraints.txt > .oldest.txt
	$(MAKE) numbers VENV=.venv-oldest CONSTRAINTS=.oldest.txt

numbers: $(INSTALLED)
	$(TESTS) $(ORDINARY) -k "not plan" tests/golden tests/sharding tests/distributed/test_training.py tests/distributed/test_resume.py

gpu-check: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch sees no GPU, gpu-check needs one")'
	PYTORCH_ALLOC_CONF=expandable_segments:True $(BIN)/python -m tests.gpu.check --processes 8 --output $(GPU_CHECK)

install: $(INSTALLED)

# On a machine without an NVIDIA driver torch comes without CUDA, which saves gigabytes, where its index can be reached.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later with its venv module is needed (Debian: python3-venv)"; exit 1; }
	@echo "installing torch, transformers and what else is needed into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	@if ! command -v nvidia-smi >/dev/null && $(BIN)/python -c \
		'import urllib.request as web; web.urlopen("$(TORCH_FOR_CPU)/torch/", timeout=5)' 2>/dev/null; \
	then $(BIN)/pip install --no-deps -c $(CONSTRAINTS) --index-url $(TORCH_FOR_CPU) torch; fi
	$(BIN)/pip install -c $(CONSTRAINTS) -e '.[test]'
	@touch $@
