# reproduce: rerun the experiments of a scale · test: everything that must hold · verify: results follow from the records · bench: how fast, side by side · readme: README.md from its notebook
# Snakemake needs Python 3.11; the library by itself runs on 3.10
recent = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do $$p -c '$(recent)' 2>/dev/null && echo $$p && break; done),python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
# uv takes a fifth of pip's time; pip where uv finds no index, since only pip reads pip.conf. Like pip it compiles what it installs, or each of the many processes would, where Python may not write bytecode
PACKAGES = --quiet --constraint constraints.txt --editable
install  = $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(PACKAGES) '.[$(1)]' || $(BIN)/pip install $(PACKAGES) '.[$(1)]'
export PATH := $(abspath $(BIN)):$(PATH)
# SCALE=demo SEEDS=3 DENSE_SEEDS=1 ABLATION_SEEDS=1 CONDITIONS=1 DEVICE=cpu MAX_MINUTES=60 override settings.ini; DRY_RUN=1 only prints the plan; KEEP=1 adds to the results that are here
export LEWEL_SCALE          := $(or $(SCALE),$(LEWEL_SCALE))
export LEWEL_SEEDS          := $(or $(SEEDS),$(LEWEL_SEEDS))
export LEWEL_DENSE_SEEDS    := $(or $(DENSE_SEEDS),$(LEWEL_DENSE_SEEDS))
export LEWEL_ABLATION_SEEDS := $(or $(ABLATION_SEEDS),$(LEWEL_ABLATION_SEEDS))
export LEWEL_CONDITIONS     := $(or $(CONDITIONS),$(LEWEL_CONDITIONS))
export LEWEL_DEVICE         := $(or $(DEVICE),$(LEWEL_DEVICE))
export LEWEL_MAX_MINUTES    := $(or $(MAX_MINUTES),$(LEWEL_MAX_MINUTES))
export LEWEL_DRY_RUN        := $(or $(DRY_RUN),$(LEWEL_DRY_RUN))
export LEWEL_KEEP           := $(or $(KEEP),$(LEWEL_KEEP))
CORES  ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# notebooks that test signals, which only a main thread gets: nbdev-test runs cells in another thread, a kernel in its main one
SIGNALS = 00|15|18|19|20|22|25|26|27
comma  := ,
# how many jobs with a GPU run at a time: as many as this machine has; where SNAKEMAKE names a profile or an executor, the cluster's machines count, not this one
GPUS   ?= $(if $(filter --profile% --executor% -e,$(SNAKEMAKE)),,$(if $(CUDA_VISIBLE_DEVICES),$(words $(subst $(comma), ,$(CUDA_VISIBLE_DEVICES))),$(shell nvidia-smi -L 2>/dev/null | grep -c GPU)))

.PHONY: reproduce test pretended verify bench readme clean

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(recent)' || { echo "error: the experiments need Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version): install one, and name it with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(call install,dev)
	touch $@

$(VENV)/bench: $(VENV)/installed
	$(call install,bench)
	touch $@

reproduce: $(VENV)/installed
	@python experiments/reproduce.py $(if $(GPUS),--resources gpu=$(GPUS)) --cores $(CORES) $(SNAKEMAKE)

test: $(VENV)/installed
	python tests/check_sync.py
	ruff check --quiet --target-version py310 --select E9,F401,F821 lewel                      # for the oldest Python it runs on
	ruff check --quiet --target-version py310 --select E9,E501,F401 --line-length 140 nbs experiments tests
	OMP_NUM_THREADS=1 nbdev-test --n-workers 2 --skip-file-re '^($(SIGNALS))_'
	ls nbs/*.ipynb | grep -E '/($(SIGNALS))_' | OMP_NUM_THREADS=1 xargs -P 2 -I {} python -m nbconvert --log-level ERROR --to notebook --execute --stdout {} > /dev/null
	@$(MAKE) --no-print-directory reproduce SCALE=smoke SEEDS=1 ABLATION_SEEDS=0
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile tests
	@$(MAKE) --no-print-directory -j2 pretended verify

pretended: $(VENV)/installed                                                                      # what a GPU would do, without one
	OMP_NUM_THREADS=1 PYTHONPATH=tests pytest -q -p pretend_gpu -k "not resumes" tests/test_cuda.py

verify: $(VENV)/installed
	PYTHONWARNINGS=ignore python experiments/verify.py

bench: $(VENV)/bench
	lewel-bench --compile

readme: $(VENV)/installed
	python nbs/readme.py
