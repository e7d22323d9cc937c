# `make help` lists the targets. Needs a Python >= 3.11 with its venv module, and a package index; no git, no GPU.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV ?= .venv
EXTRAS ?= formal,plot,lm,eval,dist,export,gpu,test,dev

# What decides the versions. With a GPU, keep your own torch: `make setup VENV=path/to/your/env CONSTRAINTS=`
# installs into that environment and replaces no torch that satisfies pyproject.toml; or name a file of your own.
CONSTRAINTS ?= constraints/cpu.txt

PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

# Where this is set, every process that tests start, and pytest itself, would compile its sources anew: seconds each.
unexport PYTHONDONTWRITEBYTECODE

STAMP := $(VENV)/.installed
# Each worker would start a thread per core; two workers on two cores would then fight over them.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help setup demo test test-all test-each-kind test-portable test-neighbours sanitize lint bench clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile

setup: $(STAMP)  ## make .venv and install the package and its tools there (once)

ENGINE := $(wildcard deltaproduct/ops/native/*.cpp deltaproduct/ops/native/*.h)

$(STAMP): pyproject.toml setup.py $(ENGINE) $(CONSTRAINTS)
	@if ! "$(VENV)/bin/python" -m pip --version >/dev/null 2>&1; then \
		test -n "$(PYTHON)" || { echo "error: found no Python >= 3.11; install one (Debian: python3.11 and python3.11-venv) or name it: make PYTHON=..." >&2; exit 1; }; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "error: $(PYTHON) does not run or is older than Python 3.11; name another: make PYTHON=..." >&2; exit 1; }; \
		"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module (Debian: install python3.11-venv, or the one of your version)" >&2; exit 1; }; \
		"$(PYTHON)" -m venv "$(VENV)"; \
	fi
	@echo "Installing deltaproduct[$(EXTRAS)] and PyTorch into $(VENV); this may take some minutes, once ..."
	@"$(VENV)/bin/python" -m pip install -qq --disable-pip-version-check $(PIP_ARGS) $(if $(CONSTRAINTS),-c "$(CONSTRAINTS)") -e ".[$(EXTRAS)]"
	@touch "$@"

demo: setup  ## learn S3 from two seeds and draw the accuracy by length, in demo/s3
	$(VENV)/bin/deltaproduct reproduce s3 --seeds 2 --out demo/s3

test: setup  ## run the tests that are fast, in at most 3 minutes; PYTEST_ARGS="-k s3" narrows them
	$(PYTEST) $(PYTEST_ARGS)

test-each-kind: setup  ## of the slow tests, run some of each kind: start processes, kill them, compile, export ... (as CI does)
	$(PYTEST) -m "" --each-kind --timeout 400 $(PYTEST_ARGS)

test-all: setup  ## run all tests, and unless PYTEST_ARGS narrows them, also in all ways of the next three
	$(PYTEST) -m "" $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(VENV)/bin/python tests/portable.py --all)
	$(if $(PYTEST_ARGS),,$(VENV)/bin/python tests/neighbours.py)
	$(if $(PYTEST_ARGS),,$(MAKE) sanitize)

test-portable: setup  ## run the numerical tests with the instructions of other processors, one way after another
	$(VENV)/bin/python tests/portable.py $(PYTEST_ARGS)

test-neighbours: setup  ## run the tests that other packages could change, with some beside and with some left out
	$(VENV)/bin/python tests/neighbours.py $(PYTEST_ARGS)

# Nothing that the address sanitizer sees anyway, nor alignment, which vectors declare: they double the build. With
# -fexpensive-optimizations, products and sums are fused as in the real build, which tests of accuracy count on.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize=null,object-size,vptr,alignment -fno-sanitize-recover=all

# The sanitizers' runtimes come before Python, which is built without them, and libstdc++ with them, so that they find
# the throw that PyTorch uses. A test asks for more memory than there is, which is to fail as it does elsewhere. Leaks are not looked for: what Python and PyTorch keep until the end would be reported.
sanitize: setup  ## run the native engine's tests on a build of it that traps what C++ leaves undefined (GCC only)
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	echo "Building the engine with GCC's sanitizers ..."; \
	DELTAPRODUCT_CXXFLAGS="-O1 -fexpensive-optimizations -g1 $(SANITIZERS)" $(VENV)/bin/python setup.py -q build_ext \
		--build-lib "$$folder" --build-temp "$$folder/objects"; \
	engine=$$(ls "$$folder"/deltaproduct/ops/native/_engine.*); \
	for name in asan ubsan stdc++; do runtimes="$$runtimes $$($${CXX:-g++} -print-file-name=lib$$name.so)"; done; \
	DELTAPRODUCT_ENGINE="$$engine" LD_PRELOAD="$$runtimes" ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:log_path=$$folder/found" \
		UBSAN_OPTIONS="print_stacktrace=1:log_path=$$folder/found" \
		$(PYTEST) --max-worker-restart=0 tests/ops/test_native.py tests/models/test_decoding.py tests/ops/test_norm.py tests/ops/test_selective_scan.py \
		-k "not compiled and (pytorchs or not pytorch)" $(PYTEST_ARGS) || \
		{ grep -hv -e ' Python/' -e ' Objects/' -e ' Include/' "$$folder"/found.* 2>/dev/null; exit 1; }

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: setup  ## time the operator's backends
	$(VENV)/bin/deltaproduct bench ops

clean:  ## remove caches, build outputs and demo/ (not .venv, not runs/)
	rm -rf build dist *.egg-info demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find deltaproduct tests -name __pycache__ -prune -exec rm -rf {} +
