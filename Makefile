# The menu. Everything runs in .venv, which the first command that needs it creates.
#
#   make demo       train a small network on the digits, prune it to half of its latency here, and report
#   make test       the whole test suite
#   make check      ruff, mypy, clang-format, then the tests
#   make sanitize   the native code of the CPU under AddressSanitizer and ThreadSanitizer
#   make bench      reproduce benchmarks/results on this machine
#   make gpu-check  tests, compute-sanitizer and benchmarks on a CUDA device, in parts that can be resumed
#   make wheel      sdist and wheel into dist/
#
# PYTHON=python3.12 chooses the interpreter, PIP_FLAGS=... adds to every pip install (an index for a CPU-only torch, say).

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_FLAGS)
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: help demo test check lint sanitize bench gpu-check wheel clean
help:
	@sed -n '/^#   make/s/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.installed: $(BIN)/python $(SOURCES)
	$(INSTALL) --editable '.[demo]'
	touch $@

# torchvision asks for one build of torch, and pip would replace the installed one to please it: hence --no-deps.
$(VENV)/test.installed: $(VENV)/demo.installed
	$(INSTALL) --editable '.[demo,onnx,test]' huggingface_hub pillow pyyaml
	$(INSTALL) --no-deps torchvision timm torch-pruning
	touch $@

demo: $(VENV)/demo.installed
	$(BIN)/hwprune prune --model resnet8 --data digits --budget 50% --method dsa \
		--batch 256 --dense-epochs 12 --search-epochs 16 --epochs 20 --out runs/demo --resume

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -ra

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.[ch]*')

check: lint test

SANITIZED := tests/sanitize/cpu.cpp $(filter-out %bindings.cpp,$(wildcard csrc/cpu/*.cpp))
sanitize:
	mkdir -p build
	set -e; for kind in address,undefined thread; do \
		$${CXX:-c++} -std=c++17 -g -O1 -fopenmp-simd -fsanitize=$$kind -fno-sanitize-recover=all \
			-Icsrc -Icsrc/include $(SANITIZED) -pthread -ldl -o build/sanitize-$$kind; \
		build/sanitize-$$kind; \
	done

# What needs data of the user's has its commands in benchmarks/README.md.
NEED_DATA := benchmarks/bench_cifar10.py benchmarks/bench_training_free.py
bench: $(VENV)/test.installed
	set -e; for bench in $(filter-out $(NEED_DATA),$(wildcard benchmarks/bench_*.py)); do $(BIN)/python $$bench; done
	$(BIN)/python -m pytest -q benchmarks
	$(BIN)/python benchmarks/plot.py

# Goes on with what has not passed at this commit; PARTS="tests conv" chooses, GPU_FLAGS="--out FOLDER" and others are said
# by benchmarks/gpu_check.py --help. It builds for itself, so PYTHON serves as it is where it has what is tested with.
gpu-check:
	set -e; python=$(PYTHON); \
	if ! $$python -c 'import torch, triton, numpy, scipy, pytest, pybind11, ninja, setuptools' 2>/dev/null; then \
		$(MAKE) $(VENV)/test.installed; python=$(BIN)/python; \
	fi; \
	$$python benchmarks/gpu_check.py $(GPU_FLAGS) $(PARTS)

wheel: $(VENV)/test.installed
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist hwprune/*.so *.egg-info
