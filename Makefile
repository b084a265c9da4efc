# Everything runs from .venv, which the first target that needs it makes. Python 3.11 is all it takes.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: setup demo serve reproduce reproduce-small train-tiny train-adapter train-small train-small-further train-adapter-small train-whisper test test-jobs test-service test-slow test-gpu lint format clean mlflow

setup: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "mmrag needs Python 3.11: $(PYTHON) not found (make PYTHON=... names another)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the packages of requirements.lock into .venv (about 7 GB, a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/python -m jobs.demo

# Options and settings as in serve/config.yaml: make serve SETTINGS="--port 8080 decoder.rows=16"
# (--host, --port, --dashboard-port; all of them: make serve SETTINGS=--help)
serve: setup
	$(BIN)/python -m serve $(SETTINGS)

reproduce: setup
	$(BIN)/python -m jobs.reproduce

reproduce-small: setup
	$(BIN)/python -m jobs.fetch_voices
	$(BIN)/python -m jobs.reproduce --config jobs/configs/reproduce_small.yaml

# Each stage goes on where a stopped one left off; the last one replaces the package's model.
train-tiny: setup
	for stage in synthesize pretrain_hubert tokenize train publish; do \
		$(BIN)/python -m jobs.$$stage --config jobs/configs/train_tiny.yaml || exit 1; \
	done

# After train-tiny or train-small: the adapter for that language model, which stays as it is.
train-adapter train-adapter-small: setup
	for stage in synthesize pretrain_hubert tokenize; do \
		$(BIN)/python -m jobs.$$stage --config $(ADAPTER) || exit 1; \
	done
	$(BIN)/python -m jobs.build_datastore --config $(ADAPTER) datastore.name=phrases datastore.entries=entities
	$(BIN)/python -m jobs.build_datastore --config $(ADAPTER) datastore.name=retrieved
	$(BIN)/python -m jobs.build_datastore --config $(ADAPTER) datastore.name=wrong \
		datastore.splits=[lm] datastore.domain=everyday
	for name in retrieved wrong; do \
		$(BIN)/python -m jobs.retrieve --config $(ADAPTER) datastore.name=$$name || exit 1; \
	done
	$(BIN)/python -m jobs.train --config $(ADAPTER)
	$(BIN)/python -m jobs.publish --config $(ADAPTER)
train-adapter: ADAPTER := jobs/configs/adapter.yaml
train-adapter-small: ADAPTER := jobs/configs/adapter_small.yaml

# The model that hears people. Its texts and recordings lie below MMRAG_CORPUS (docs/models.md).
# train-small-further begins with the package's, and teaches its encoder to spell.
train-small train-small-further: setup
	$(BIN)/python -m jobs.fetch_voices
	for stage in synthesize pretrain_hubert tokenize train ngram publish; do \
		$(BIN)/python -m jobs.$$stage --config $(SMALL) || exit 1; \
	done
train-small: SMALL := jobs/configs/train_small.yaml
train-small-further: SMALL := jobs/configs/train_small_further.yaml

# A small Whisper, trained in an hour on two CPU cores, and what a datastore does for it.
train-whisper: setup
	for stage in synthesize train_whisper reproduce; do \
		$(BIN)/python -m jobs.$$stage --config jobs/configs/whisper_tiny.yaml || exit 1; \
	done

# Two processes, each with a Ray cluster of its own; what one of them says is printed at its end.
test: setup
	$(MAKE) --jobs=2 --output-sync=target --keep-going test-jobs test-service

test-jobs:
	$(BIN)/python -m pytest tests/cluster tests/jobs --ignore=tests/jobs/benchmark $(wildcard tests/test_*.py)

test-service:
	$(BIN)/python -m pytest tests/jobs/benchmark tests/mmrag tests/serve

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mlflow: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
