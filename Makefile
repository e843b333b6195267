# Each target sets up .venv on first use; nothing else has to be installed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# What makes outputs the same on every machine: no GPU, full precision; and one thread a process, so that two
# processes on two cores don't slow each other twentyfold. PyTorch's compiler has no work on a CPU here, and its import
# takes seconds of each process.
REPEATABLE := CUDA_VISIBLE_DEVICES= HELPERS_DTYPE=float32 HELPERS_LLM=tiny HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
  TORCHDYNAMO_DISABLE=1

.DEFAULT_GOAL := help
.PHONY: help lab test run chat bench stress

help:
	@echo "make lab     open the course in JupyterLab"
	@echo "make test    run the tests, notebooks included (minutes)"
	@echo "make run     run every notebook headless into runs/ and print its time"
	@echo "make chat    ask the documents in mis_documentos/ until 'salir'"
	@echo "make bench   measure QLoRA at gpt-oss-20b's shape: memory and tokens a second (a GPU, or a small one on the CPU)"
	@echo "make stress  the long and brutal tests"

$(READY): requirements.lock requirements.txt pyproject.toml
	@echo "First use: setting up .venv with the packages of requirements.lock (2 to 10 minutes, about 2 GB) …"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} was found; the course runs on 3.11 to 3.13. Name one: make lab PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "Python's venv module is missing: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
	@echo "Ready."

# Loopback only. As root (a container) JupyterLab wants to be told that this is meant; without a display it prints
# the address instead of opening a browser.
lab: $(READY)
	@$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.allow_remote_access=False \
	  $(if $(filter 0,$(shell id -u)),--allow-root) \
	  $(if $(or $(DISPLAY),$(WAYLAND_DISPLAY),$(filter Darwin,$(shell uname))),,--no-browser) \
	  --LabApp.news_url= --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  notebooks/00_start_here.ipynb

# On two cores: most notebooks in one process; in a second all other tests, and then some solutions (06 comes after 05 has
# left its adapter). The lines of the second come first. A backend from outside would keep figures out of the outputs.
LATER := $(foreach number,02 04 06 A1,notebooks/solutions/$(number)_solutions.ipynb)
FIRST := $(filter-out $(LATER),$(sort $(wildcard notebooks/*.ipynb)) $(sort $(wildcard notebooks/solutions/*.ipynb)))
test: $(READY)
	@mkdir -p runs
	@export $(REPEATABLE) OMP_NUM_THREADS=1; unset MPLBACKEND; \
	  $(BIN)/python -m pytest $(FIRST) >runs/test_notebooks.txt 2>&1 & notebooks=$$!; \
	  trap 'kill $$notebooks; exit 130' INT TERM; \
	  $(BIN)/python -m pytest; others=$$?; \
	  $(BIN)/python -m pytest $(LATER); later=$$?; \
	  echo "The notebooks:"; wait $$notebooks; notebooks=$$?; cat runs/test_notebooks.txt; \
	  [ $$others -eq 0 ] && [ $$later -eq 0 ] && [ $$notebooks -eq 0 ]

run: $(READY)
	@$(REPEATABLE) $(BIN)/python tests/tools/run_notebooks.py

chat: $(READY)
	@$(BIN)/python -m helpers chat

bench: $(READY)
	@$(BIN)/python tests/tools/bench_qlora.py

stress: $(READY)
	@$(REPEATABLE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m stress
