# Everything here works from a fresh clone; a second call repeats only what changed.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
ARGS ?=
# Of `make fuzz`.
MINUTES ?= 10
# Of `make gpu`.
BUDGET ?= 540
RESULTS ?= build/gpu

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check -qq
cpp := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
sources := setup.py pyproject.toml CMakeLists.txt cmake/cuda.cmake $(filter-out csrc/testing/%,$(cpp))
# Kept here and not in VENV, which may serve several clones.
stamps := build/stamps$(subst /,-,$(abspath $(VENV)))
checked := build/sanitize/site
# What tests/test_cuda_build.py needs: in continuous integration without a CUDA toolkit the compiler from PyPI (0.3 GB).
comma := ,
nvcc := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
cuda_build := $(if $(CI),$(if $(nvcc),,$(comma)cuda-build))
# Dates of files in wheels and in the source archive: with it two builds of a commit have the same bytes.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
# auditwheel checks that the wheel runs on every system of the platform $(2), and names it so. torch's libraries are in
# the process before ours. $(1): LOMO_CUDA; $(3): options of the wheel command.
define build_wheel
@rm -rf build/wheel && mkdir -p build/wheel
@LOMO_CUDA=$(1) $(pip) wheel --no-deps --no-build-isolation $(3) -w build/wheel .
@PATH="$(abspath $(bin)):$$PATH" $(bin)/auditwheel repair --plat $(2) --only-plat --exclude 'libtorch*' -w dist build/wheel/*.whl
@cd build/wheel && name=$$(ls *.whl | sed 's/linux_[^-]*$$//') && cd ../../dist \
  && $(abspath $(bin))/twine check --strict $$name* && $(abspath $(bin))/check-wheel-contents $$name*
endef
platform := manylinux_2_28_$(shell uname -m)
need_compiler := for name in $${CXX:-c++ g++ clang++}; do command -v $$name >/dev/null && exit; done; \
  echo "A C++17 compiler is needed: install one (Debian, Ubuntu: apt install g++) or set CXX." >&2; exit 1

after := echo "'$(bin)/pytest-benchmark compare OLD NEW' shows results of two files side by side."

.PHONY: help demo test faults fuzz sanitize sanitize-threads bench bench-full machine-code gpu wheel wheel-cuda sdist lint format testing clean environment FORCE
.NOTPARALLEL:

help:            ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 14
	@echo 'Settings: VENV=$(VENV) PYTHON=$(PYTHON) TORCH="$(TORCH)" WORKERS=$(WORKERS) ARGS="$(ARGS)"'

demo: $(stamps)/demo   ## watch an optimizer step with and without LOMO
	@$(bin)/python -m lomo_kernels demo $(ARGS)

test: testing    ## all tests except the slow ones; ARGS=--slow adds these, ARGS="-k sgd" selects
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest tests -n $(WORKERS) --dist worksteal $(ARGS)

bench: testing   ## measure a short selection; ARGS="update norm" selects questions
	@$(bin)/python -m bench $(ARGS)
	@$(after)

bench-full: testing   ## measure every size and case, which takes more than an hour
	@$(bin)/python -m bench --full $(ARGS)
	@echo "Next: '$(bin)/python -m bench.report' writes bench/results/README.md and the documents' tables from it."
	@$(after)

machine-code: $(stamps)/test   ## count the GPU kernels' instructions, without a GPU
	@$(bin)/python -m bench.machine_code

gpu:             ## test and measure a GPU within BUDGET seconds, into RESULTS, with PYTHON's torch; ARGS="ncu" selects
	@$(PYTHON) -m bench.gpu --budget=$(BUDGET) --results=$(RESULTS) $(ARGS)

wheel: $(stamps)/wheel   ## a wheel for CPUs (manylinux_2_28, as torch's) in dist/, checked
	$(call build_wheel,0,$(platform))

wheel-cuda: $(stamps)/wheel-cuda   ## the same with kernels for all GPUs; LOMO_CUDA_ARCHS="80;90" for some
	$(call build_wheel,1,auto,-C--build-option=--build-number=1cuda)

sdist: $(stamps)/wheel   ## the sources in dist/, which build offline: tests/build/reproducible.py does it, twice
	@$(bin)/python -m build --sdist --no-isolation --outdir dist .
	@$(bin)/twine check --strict dist/*.tar.gz

lint: $(stamps)/lint   ## formatters, linter and type checker
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(cpp)
	$(bin)/mypy

format: $(stamps)/lint   ## rewrite the sources as lint wants them
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp)

testing: $(stamps)/test   ## the C++ module of the tests and benches
	@[ -f "$$($(bin)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] \
	  || { echo "Python's C headers are missing: install them (Debian, Ubuntu: apt install python3-dev)." >&2; exit 1; }
	@$(bin)/cmake -S . -B build/testing -G Ninja -DLOMO_TESTING=ON -DLOMO_CUDA=0 -DPYTHON=$(abspath $(bin)/python) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) >/dev/null
	@$(bin)/cmake --build build/testing --target lomo_kernels_testing _emulated

faults: testing  ## faults at every point of a step, kills, threads, ranks, long runs: hours; ARGS="memory lines --stride 20"
	@OMP_NUM_THREADS=1 PYTHONPATH=tests:build/testing $(bin)/python -m faults $(ARGS)

fuzz: $(stamps)/test   ## random operator calls, models and state dicts for MINUTES=10; ARGS="operators --seed=1" selects
	@cd tests && OMP_NUM_THREADS=1 PYTHONPATH=$(abspath .) $(abspath $(bin))/python -m fuzz --minutes=$(MINUTES) $(ARGS)

sanitize: $(stamps)/test   ## the operators' tests and random calls, and tests of emulated CUDA kernels, under the address and undefined-behaviour sanitizers
	@rm -rf $(checked)/lomo_kernels && mkdir -p $(checked) && cp -r lomo_kernels $(checked)
	@$(bin)/cmake -S . -B build/sanitize -G Ninja -DLOMO_SANITIZE=address,undefined -DLOMO_TESTING=ON -DLOMO_CUDA=0 \
	  -DPYTHON=$(abspath $(bin)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) -DLOMO_OUTPUT_DIR=$(abspath $(checked))/lomo_kernels >/dev/null
	@$(bin)/cmake --build build/sanitize --target _cpu _emulated
	@# The runtime must come first in the process, with the C++ library, whose exceptions it watches; the interpreter's
	@# own leaks are not our subject. pytest is not started with "python -m", which would put this folder's package
	@# before the checked one.
	@# Without operators whose kernels are the CPU's alone for the emulated ones.
	@cpu="tests/test_linear.py tests/test_embedding.py tests/test_factored.py tests/test_split.py tests/test_rules.py"; \
	for isa in baseline avx2 avx512 avx512bf16 amx emulated; do \
	  case $$isa in avx512) flag=avx512bw;; avx512bf16) flag=avx512_bf16;; amx) flag=amx_bf16;; avx2) flag=avx2;; *) flag=;; esac; \
	  [ -z "$$flag" ] || grep -qw $$flag /proc/cpuinfo || { echo "This processor lacks $$isa: left out"; continue; }; \
	  [ $$isa != emulated ] || { cpu=; cp build/sanitize/_emulated.so $(checked)/lomo_kernels/_cpu.so; }; \
	  export OMP_NUM_THREADS=1 LOMO_KERNELS_ISA=$$isa PYTHONPATH=$(abspath $(checked)); \
	  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1; \
	  first="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)"; \
	  LD_PRELOAD="$$first" $(bin)/pytest -q -n $(WORKERS) tests/test_sgd.py tests/test_sq_norm.py tests/test_overlap.py $$cpu $(ARGS) \
	  && { [ $$isa = emulated ] || (cd tests && LD_PRELOAD="$$first" $(abspath $(bin))/python -m fuzz operators --cases=10000 --minutes=60); } \
	  || exit 1; done

# Only this library is built with the sanitizer, so what torch's own threads do is not seen. Its thread pool is not used
# (one thread for each caller): the sanitizer does not know OpenMP's barriers and takes what they order for races.
sanitize-threads: $(stamps)/test   ## operators called from several threads, under the thread sanitizer
	@rm -rf build/tsan/site && mkdir -p build/tsan/site && cp -r lomo_kernels build/tsan/site
	@$(bin)/cmake -S . -B build/tsan -G Ninja -DLOMO_SANITIZE=thread -DLOMO_CUDA=0 \
	  -DPYTHON=$(abspath $(bin)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) -DLOMO_OUTPUT_DIR=$(abspath build/tsan/site)/lomo_kernels >/dev/null
	@$(bin)/cmake --build build/tsan --target _cpu
	@for isa in baseline avx2 avx512 avx512bf16 amx; do \
	  case $$isa in avx512) flag=avx512bw;; avx512bf16) flag=avx512_bf16;; amx) flag=amx_bf16;; avx2) flag=avx2;; *) flag=;; esac; \
	  [ -z "$$flag" ] || grep -qw $$flag /proc/cpuinfo || { echo "This processor lacks $$isa: left out"; continue; }; \
	  OMP_NUM_THREADS=1 LOMO_KERNELS_ISA=$$isa PYTHONPATH=build/tsan/site:tests \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libtsan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  TSAN_OPTIONS="exitcode=66 halt_on_error=0 ignore_noninstrumented_modules=1" \
	  $(bin)/python -P tests/support/threads.py || exit 1; done

clean:           ## remove what was built; VENV stays
	rm -rf build dist *.egg-info lomo_kernels/*.so

$(stamps)/demo: extras := demo
# Tests run the benches' rivals and draw their plots.
$(stamps)/test: extras := demo,test,bench$(cuda_build)
$(stamps)/lint: extras := demo,lint
$(stamps)/wheel: extras := wheel
$(stamps)/wheel-cuda: extras := wheel$(if $(nvcc),,$(comma)cuda-build)
$(stamps)/demo $(stamps)/test $(stamps)/lint $(stamps)/wheel $(stamps)/wheel-cuda: $(stamps)/environment $(sources)
	@$(need_compiler)
	@echo "Building lomo_kernels and installing it with [$(extras)] into $(VENV)"
	@$(pip) install -e '.[$(extras)]'
	@touch $@

# Made anew when VENV or TORCH is another one. An existing environment keeps its torch unless TORCH is given. numpy: torch
# warns at every start without it.
$(stamps)/environment: FORCE
	@[ -x $(bin)/python ] && [ ! $(VENV)/pyvenv.cfg -nt $@ ] && echo '$(TORCH)' | cmp -s - $@ \
	  || $(MAKE) --no-print-directory environment

environment:
	@$(need_compiler)
	@[ -x $(bin)/python ] || $(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 10)' 2>/dev/null \
	  || { echo "Python 3.10 or newer with its venv module is needed (Debian, Ubuntu: apt install python3-venv);" \
	            "PYTHON=... names another one than $(PYTHON)." >&2; exit 1; }
	@echo "Installing $(TORCH) into $(VENV), which can take minutes"
	@[ -x $(bin)/python ] || $(PYTHON) -m venv $(VENV)
	@$(bin)/python -m pip --version >/dev/null 2>&1 || $(bin)/python -m ensurepip
	@$(pip) install --upgrade pip setuptools
	@[ '$(origin TORCH)' = file ] && $(bin)/python -c 'import torch' 2>/dev/null \
	  || $(pip) install $(foreach word,$(TORCH),'$(word)')
	@$(pip) install numpy
	@mkdir -p $(stamps) && echo '$(TORCH)' > $(stamps)/environment
