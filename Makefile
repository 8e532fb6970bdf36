# make help. Each target works first thing after a clone; it needs make, Python >= 3.11 and a package registry.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
TORCH ?=
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
UV := sh scripts/uv.sh $(BIN)/python
INSTALLED := $(VENV)/installed
PEERS ?= .venv-open-clip
PEERS_INSTALLED := $(PEERS)/installed
TORCH_OPTIONS = $(if $(TORCH_INDEX),--index $(TORCH_INDEX) --index-strategy unsafe-best-match) $(TORCH)
DEFAULT_DOWNLOAD = $(if $(filter Darwin,$(shell uname -s)),about 0.4 GB,about 3 GB (torch with CUDA; 6 GB on disk))
WORKERS := -n logical --maxprocesses 4 --dist loadfile
DOWNLOAD = $(if $(TORCH)$(TORCH_INDEX)$(UV_TORCH_BACKEND),torch as chosen and what it needs,$(DEFAULT_DOWNLOAD))

.DEFAULT_GOAL := help
.PHONY: help install pretrain zero-shot export supervised diffusion test test-all lint bench strategies faults bench-gpu wheel clean

help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="name=try train.samples=20000"   settings for make pretrain; options of pytest for make test'
	@echo '  ARGS="-n 0 tests/test_losses.py"      make test in one process, without workers'
	@echo '  PYTHON=python3.12                     the Python that makes the environment'
	@echo '  VENV=.venv                            where the environment is'
	@echo '  UV_TORCH_BACKEND=cpu                  torch without CUDA, about 0.5 GB in all (also cu126, cu130, rocm..., auto)'
	@echo '  TORCH="torch==2.13.0+cpu torchvision==0.28.0+cpu"   exact builds; give both, of one kind'
	@echo '  TORCH_INDEX=<index>                   a further package index, for such builds'
	@echo
	@echo 'The build of torch is chosen when .venv is made; make clean, to choose anew.'

install: $(INSTALLED) ## make .venv and install clipkit in it, editable, with what it needs

pretrain: $(INSTALLED) ## train a small CLIP on the embedded emoji set (about 1,100 CPU seconds)
	$(BIN)/clipkit pretrain $(ARGS)

zero-shot: $(INSTALLED) ## measure runs/emoji on its three tests, with intervals and a report
	$(BIN)/clipkit zero-shot $(ARGS)

export: $(INSTALLED) ## hand the text encoder of runs/emoji to transformers and diffusers (runs/emoji/export/)
	$(BIN)/clipkit export overwrite=true $(ARGS)

supervised: $(INSTALLED) ## the same image tower trained by softmax over fixed classes, beside runs/emoji (docs/clip.md)
	$(BIN)/python -m scripts.supervised $(ARGS)

diffusion: $(INSTALLED) ## latent diffusion after make pretrain: autoencoder, U-Net, a judge, pictures (about 3,500 CPU seconds)
	@test -f runs/emoji/model/open_clip_config.json || { echo 'runs/emoji is not there yet: make pretrain' >&2; exit 1; }
	$(BIN)/clipkit export overwrite=true
	$(BIN)/clipkit diffusion autoencoder
	$(BIN)/clipkit diffusion train
	$(BIN)/clipkit pretrain experiment=emoji_judge
	$(BIN)/clipkit diffusion evaluate scored_by=runs/emoji_judge
	$(BIN)/clipkit diffusion evaluate scored_by=runs/emoji_judge prompts=emoji_val steps=25

test: $(INSTALLED) ## run the quick tests (CPU, offline)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not multiprocess" $(ARGS)

test-all: $(INSTALLED) ## run all tests; those that start processes come last, one by one
	$(BIN)/python -m pytest $(WORKERS) -m "not multiprocess" $(ARGS) || test $$? = 5
	$(BIN)/python -m pytest -m multiprocess $(ARGS) || test $$? = 5

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(INSTALLED) $(PEERS_INSTALLED) ## measure clipkit beside open_clip_train on this CPU (docs/benchmarks.md)
	$(BIN)/python -m scripts.bench --peer-python $(PEERS)/bin/python $(ARGS)

strategies: $(INSTALLED) ## train 50 steps under ddp, fsdp and hsdp on 1, 2 and 4 processes, and compare (docs/scaling.md)
	$(BIN)/python -m scripts.bench.strategies $(ARGS)

faults: $(INSTALLED) ## inject 218 faults into real runs, and see how each ends (docs/reliability.md); as root
	$(BIN)/python -m scripts.faults $(ARGS)

bench-gpu: $(INSTALLED) $(PEERS_INSTALLED) ## the same on a GPU: steps of ViT-B/32, B/16 and L/14, MFU, kernels
	$(BIN)/python -m scripts.bench.gpu --peer-python $(PEERS)/bin/python $(ARGS)

wheel: $(INSTALLED) ## build dist/*.whl, install it in an empty environment and run it from another folder
	sh scripts/check_wheel.sh $(BIN)/python

clean: ## remove .venv, caches and built files; runs/ stays
	rm -rf $(VENV) $(PEERS) dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'clipkit needs Python >= 3.11$(if $(PYTHON),; $(PYTHON) is not); give make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@echo 'Installing into $(VENV). To download, unless cached: $(DOWNLOAD).'
	@echo 'Another build of torch: make UV_TORCH_BACKEND=cpu; see make help.'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo '$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	@$(UV) pip install $(TORCH_OPTIONS) -e '.[dev]'
	@$(BIN)/python -c 'import torch, torchvision as v; print("Ready: torch", torch.__version__, "torchvision", v.__version__)' \
		2>/dev/null || { echo 'torch and torchvision are not of one build; give both, see TORCH in make help' >&2; exit 1; }
	@touch $@

# open_clip_train 3.3 ends at the first shard's end with webdataset >= 0.2.96, so it gets an environment of its own.
$(PEERS_INSTALLED): $(INSTALLED)
	@$(PYTHON) -m venv --clear $(PEERS)
	@torch=$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])'); \
	vision=$$($(BIN)/python -c 'import torchvision; print(torchvision.__version__.split("+")[0])'); \
	sh scripts/uv.sh $(BIN)/python pip install --python $(PEERS)/bin/python $(if $(TORCH_INDEX),--index $(TORCH_INDEX) \
		--index-strategy unsafe-best-match) "torch==$$torch" "torchvision==$$vision" open_clip_torch==3.3.0 webdataset==0.2.86 \
		pandas fsspec tqdm psutil
	@touch $@
