# Every target makes and uses .venv (Python 3.11 or newer; constraints.txt pins what goes into it).
#
#   make sample    16 class-guided images from the shipped model -> samples/
#   make test      the whole test suite
#   make help      the rest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Further arguments of pip, for example --index-url=... of a mirror or of torch's CPU wheels.
PIP_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt $(PIP_ARGS)
NATIVE := $(shell find csrc python -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: help install install-tensorrt-rtx sample test lint format bench gpu clean

help:
	@echo "make sample    16 class-guided glyphs from the shipped model -> samples/"
	@echo "make test      the whole test suite (PYTEST_ARGS=... for a part of it)"
	@echo "make lint      ruff and clang-format, checks only;  make format  applies them"
	@echo "make bench     the three ops against plain torch on this machine -> build/bench_ops.json"
	@echo "make gpu       on a machine with an NVIDIA GPU: build for it, tests, compute-sanitizer, benchmarks"
	@echo "               (ONLY=build,tests,sanitizer,ops  DRY_RUN=1); installs nothing"
	@echo "make install   .venv with the built package;  make clean  removes .venv and what was built"
	@echo
	@echo "PYTHON=python3.12   which Python makes .venv        PIP_ARGS=...   further pip arguments"
	@echo "ADM_RT_CUDA=auto|on|off, ADM_RT_CUDA_ARCHS=90, MAX_JOBS=2: see README.md"

# ---- The environment: build tools, then the extension, then the package with its dependencies ----

$(VENV)/.created:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'make: $(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=/path/to/python3.11' % sys.version_info[:2])"
	@echo "make: creating $(VENV)"
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.tools: $(VENV)/.created constraints.txt
	$(PIP) setuptools cmake ninja pybind11
	@touch $@

$(VENV)/.built: $(VENV)/.tools setup.py CMakeLists.txt adm_rt/__init__.py $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# An editable install: what changes in adm_rt/ counts at once. Nothing is built twice: this finds
# the objects of the step above.
$(VENV)/.installed: $(VENV)/.built pyproject.toml constraints.txt
	$(PIP) --no-build-isolation -e '.[data,test]'
	@touch $@

# Also after changes that need no new install.
install: $(VENV)/.installed

# TensorRT-RTX (NVIDIA's licence, 95 MB): with it `make test` builds real engines, without a GPU.
install-tensorrt-rtx: install
	$(PIP) --no-build-isolation -e '.[data,test,test-tensorrt]'

# ---- Targets ----

sample: install
	$(BIN)/adm-rt sample --model glyphs32 --num-images 16 --steps 25

# A process per core, at most 4, each with one thread; a file's tests stay together because they
# share fixtures.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

$(VENV)/.lint: $(VENV)/.created constraints.txt
	$(PIP) ruff clang-format
	@touch $@

CPP := $(shell find csrc python tests -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "clang-format: $(words $(CPP)) files"
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: install
	@mkdir -p build
	$(BIN)/python benchmarks/bench_ops.py --json build/bench_ops.json

# Downloads nothing: the .venv if there is one, else PYTHON with torch, cmake, ninja, pybind11, pytest.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(if $(ONLY),--only $(ONLY)) $(if $(DRY_RUN),--dry-run) $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info adm_rt/_build.json adm_rt/_C.*.so adm_rt/_cuda.*.so adm_rt/libadm_rt_trt.so samples
