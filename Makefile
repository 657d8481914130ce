# reproduce: rerun the experiments of a scale · test: everything that must hold · bench: how fast, side by side · readme: README.md from its notebook
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# SCALE=demo SEEDS=3 DEVICE=cpu override settings.ini
export LEWEL_SCALE  := $(SCALE)
export LEWEL_SEEDS  := $(SEEDS)
export LEWEL_DEVICE := $(DEVICE)
CORES  ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
GPUS   ?= $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)

.PHONY: reproduce test bench readme clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

reproduce: $(VENV)/installed
	@snakemake --snakefile experiments/Snakefile --cores $(CORES) --resources gpu=$(GPUS) --keep-going --rerun-incomplete --rerun-triggers mtime input params --quiet rules progress host
	@python experiments/show.py

test: $(VENV)/installed
	python tests/check_sync.py
	ls nbs/*.ipynb | OMP_NUM_THREADS=1 xargs -P 2 -n 1 nbdev-test --n-workers 0
	@$(MAKE) --no-print-directory reproduce SCALE=smoke SEEDS=1
	OMP_NUM_THREADS=1 pytest -q tests

bench: $(VENV)/bench
	lewel-bench

readme: $(VENV)/installed
	python nbs/readme.py
