PY      ?= python3
VENV    ?= .venv
BIN      = $(VENV)/bin
FLAVOUR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
EXTRAS  ?= train,demo,$(FLAVOUR),openvino,geotiff,geo,docs,dev
STAMP    = $(VENV)/.installed-$(FLAVOUR)
# uv does not read pip's settings: hand it pip's wheel folder, if one is configured.
export UV_FIND_LINKS ?= $(shell $(PY) -m pip config get global.find-links 2>/dev/null)
export BENTOML_DO_NOT_TRACK = true
export DVC_NO_ANALYTICS = 1
export ORT_DISABLE_TELEMETRY = 1
export HF_HUB_OFFLINE = 1
# Without bytecode every stage and server compiles the libraries that it imports again: half of the seconds of `import torch`.
unexport PYTHONDONTWRITEBYTECODE
# The virtual environment's tools must be first on PATH: dvc.yaml calls `python`.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup check test lint demo serve compare bench soak docs release lock

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PY) -m venv $(VENV)
	$(BIN)/pip install -q uv==0.13.9
	@# Under its earlier name the project would be installed twice.
	@$(BIN)/uv pip uninstall -q --python $(BIN)/python marginalia 2>/dev/null || true
	@# The two onnxruntime builds overwrite each other: when the card came or went, take the other one out first.
	@if ls $(VENV)/.installed-* >/dev/null 2>&1; then \
	  $(BIN)/uv pip uninstall -q --python $(BIN)/python onnxruntime onnxruntime-gpu 2>/dev/null || true; rm -f $(VENV)/.installed-*; fi
	$(BIN)/uv pip install -q --no-config --python $(BIN)/python \
	  $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) -c constraints.txt -e '.[$(EXTRAS)]'
	@# DVC keeps pickles below /var/tmp/dvc, where anybody may write; here they are the project's own.
	@[ ! -x $(BIN)/dvc ] || $(BIN)/dvc config --local core.site_cache_dir '$(CURDIR)/.dvc/tmp/site'
	touch $@

lock:
	UV_FIND_LINKS= $(BIN)/uv pip compile --no-config -q --universal --python-version 3.11 \
	  --no-header --no-annotate --all-extras pyproject.toml -o constraints.txt

# DVC needs a name for the commits that experiments are kept in; a fresh machine has none.
export GIT_AUTHOR_NAME ?= $(shell git config user.name 2>/dev/null || echo marginalia)
export GIT_AUTHOR_EMAIL ?= $(shell git config user.email 2>/dev/null || echo marginalia@localhost)
export GIT_COMMITTER_NAME ?= $(GIT_AUTHOR_NAME)
export GIT_COMMITTER_EMAIL ?= $(GIT_AUTHOR_EMAIL)

# What is quick: style, types and every test that is not marked slow, in two or three minutes.
check: lint
	$(BIN)/python tests/run_suite.py -m "not slow"

test: setup
	$(BIN)/python tests/run_suite.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages below docs/ as a site in site/; a broken link or a page outside the navigation is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

# What is published: sdist, wheel and a bill of materials, each checked; the wheel in an environment of its own.
release: setup
	rm -rf dist
	$(BIN)/uv build -q --no-config -o dist .
	$(BIN)/uv tool run -q --no-config twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/uv tool run -q --no-config --from cyclonedx-bom cyclonedx-py environment $(BIN)/python --output-reproducible \
	  --pyproject pyproject.toml --output-file dist/sbom.cdx.json
	$(BIN)/uv venv -q --no-config --clear dist/.smoke
	$(BIN)/uv pip install -q --no-config --python dist/.smoke dist/*.whl
	cd dist && .smoke/bin/marginalia --version && .smoke/bin/marginalia preset && .smoke/bin/python -c 'import marginalia'
	rm -rf dist/.smoke
	ls -l dist

demo: setup
	@git rev-parse --git-dir >/dev/null 2>&1 || $(BIN)/dvc config --local core.no_scm true
	$(BIN)/dvc repro
	$(BIN)/marginalia report

serve: setup
	$(BIN)/marginalia serve

# Methods over seeds as DVC experiments: COMPARE="--methods fixmatch,s4mc --seeds 0,1".
compare: setup
	$(BIN)/marginalia compare $(COMPARE)

# Ratios of one run on this machine; run it when the machine is otherwise idle.
bench: setup
	for name in ratios/mask_png ratios/metric_share ratios/metric_speed ratios/repro_noop ratios/ingest ratios/step_time serving/tail_latency; do \
	  $(BIN)/python benchmarks/$$name.py --out benchmarks/results/$$name.json || exit 1; done
	for name in in_process request_latency overload swap cold_start; do \
	  $(BIN)/python benchmarks/serving/$$name.py $(SERVED) --out benchmarks/results/serving/$$name.json || exit 1; done

# The benchmarks of the server take the bundle of the last run, where there is one.
SERVED = $$(test -d bundle && echo --bundle bundle)
MINUTES ?= 30

# Mixed load with faults and swaps: what was sent, answered, turned away and failed, and the memory at start and end.
soak: setup
	$(BIN)/python benchmarks/serving/soak.py --minutes $(MINUTES) $(SERVED) --out benchmarks/results/serving/soak.json
