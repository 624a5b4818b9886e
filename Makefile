# Everything a fresh machine with Python and git needs: `make serve`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Ray starts jobs with the `python` that is on its PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: serve test fuzz chaos bench check format models proto clean

# The service in the foreground, on http://127.0.0.1:8000, which must be free; Ctrl-C ends it. Makes the models first.
serve: $(VENV)/installed
	$(BIN)/trimtab serve deploy.yaml

# The whole test suite, units in as many processes as there are cores. TESTS="tests/unit" runs a part of it.
TESTS ?= tests/unit tests/cluster
test: $(VENV)/installed-dev models
	set -e; for part in $(TESTS); do \
		case $$part in tests/unit*) several="--numprocesses auto --dist loadfile" ;; *) several= ;; esac; \
		$(BIN)/python -m pytest $$several $$part; \
	done

# What no honest client sends: 10,000 hostile requests, the OpenAPI schema's corners, broken bytes on every port; some
# minutes. `make test` has a small sample of it. FUZZ=1000 sends fewer.
FUZZ ?= 10000
fuzz: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/unit/cluster/exchange/test_fuzz.py tests/unit/deploy/http/test_fuzz_bodies.py \
		tests/cluster/test_fuzz_*.py --fuzz $(FUZZ) --timeout 1800

# Steady load while processes are killed, stopped and drained, and clients that leave in mid-stream; some ten minutes.
# `make test` has a small sample of it. CHAOS=52 does so many faults, LEAVERS=2000 lets so many clients leave.
CHAOS ?= 26
LEAVERS ?= 500
chaos: $(VENV)/installed-dev
	RAY_SERVE_PROXY_USE_GRPC=1 RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1 $(BIN)/python -m pytest \
		tests/cluster/test_chaos.py --chaos $(CHAOS) --leavers $(LEAVERS) --timeout 3600 -s

# Speed beside transformers `generate`, as a table and in results/bench; about 40 minutes. ARGS="--help" says how to shorten.
ARGS ?=
bench: $(VENV)/installed-dev models
	RAY_SERVE_PROXY_USE_GRPC=1 $(BIN)/python -m bench.run $(ARGS)

# Format, lint and types.
check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy actors cluster deploy tests bench

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The base model and the shipped guides, into models/; skips what is there.
models: $(VENV)/installed
	$(BIN)/trimtab models

# The step protocol's generated code.
proto: $(VENV)/installed-dev
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. cluster/exchange/step.proto

clean:
	rm -rf $(VENV) models .mypy_cache .ruff_cache .pytest_cache

$(VENV)/made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Trimtab needs Python 3.11 or newer; name one with PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

# torch first and by its exact version: a range would take a build with gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/made
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[train,dev]'
	touch $@
