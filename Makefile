# Each command makes .venv when needed, with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp csrc/test/*.cpp)

.PHONY: demo test lint bench format sanitize check-arm check-install clean

demo: .venv/.installed
	$(BIN)/python -m batchnorm demo

test: .venv/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

bench: .venv/.installed
	for framework in tensorflow pytorch numpy jax; do $(BIN)/python -m benchmarks $$framework --update-docs || exit 1; done

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The kernels under sanitizers, for each instruction set of this processor: memory and undefined behaviour on one thread
# and on three, then several callers at once, and their races. Scratch arrays are allocations of their own here, so that
# the limits of each are watched. SANITIZE_ISAS names the sets that are run; asking for more than there is falls back on
# what is there.
SANITIZE := build/sanitize
SANITIZE_SOURCES := $(addprefix csrc/,test/sanitize.cpp averages.cpp dispatch.cpp memory.cpp processors.cpp threads.cpp)
SANITIZE_FLAGS := -std=c++17 -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -fno-math-errno \
	-fno-trapping-math -Icsrc -pthread
SANITIZE_ISAS := $(shell grep -q avx512_bf16 /proc/cpuinfo && echo avx512bf16) \
	$(shell grep -q avx512vl /proc/cpuinfo && echo avx512) \
	$(shell grep -q avx2 /proc/cpuinfo && echo avx2) baseline
DEPENDENCIES := $(SANITIZE_SOURCES) $(wildcard csrc/*.hpp) csrc/instruction_set.cpp Makefile

sanitize: $(SANITIZE)/memory $(SANITIZE)/races
	for isa in $(SANITIZE_ISAS); do \
		echo "memory, $$isa" && BATCHNORM_ISA=$$isa $(SANITIZE)/memory && BATCHNORM_ISA=$$isa $(SANITIZE)/memory threads && \
		echo "races, $$isa" && BATCHNORM_ISA=$$isa $(SANITIZE)/races threads || exit 1; \
	done

$(SANITIZE)/memory: SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=all
$(SANITIZE)/races: SANITIZER := -fsanitize=thread
$(SANITIZE)/memory $(SANITIZE)/races: $(DEPENDENCIES)
	mkdir -p $(SANITIZE)
	x86="$$(uname -m | grep -x x86_64)"; \
	compile() { $(CXX) $(SANITIZE_FLAGS) -g -O1 -fno-omit-frame-pointer -DBATCHNORM_CHECKED $(SANITIZER) "$$@"; }; \
	isa() { compile -c csrc/instruction_set.cpp -o $@.$$1.o -DBATCHNORM_ISA=$$1 -DBATCHNORM_VECTOR_BYTES=$$2 $$3; }; \
	isa baseline 16 && objects=$@.baseline.o && if [ -n "$$x86" ]; then \
		isa avx2 32 "-mavx2 -mfma -mf16c" && \
		avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c" && \
		isa avx512 64 "$$avx512" && isa avx512bf16 64 "$$avx512 -mavx512bf16" && \
		objects="$$objects $@.avx2.o $@.avx512.o $@.avx512bf16.o -DBATCHNORM_X86 -DBATCHNORM_AVX512BF16"; \
	fi && compile $$objects $(SANITIZE_SOURCES) -o $@

# The kernels for ARM, run by an emulator.
ARM := aarch64-linux-gnu-g++
check-arm: $(SANITIZE)/arm
	qemu-aarch64 $(SANITIZE)/arm few
	qemu-aarch64 $(SANITIZE)/arm threads

$(SANITIZE)/arm: $(DEPENDENCIES)
	@for tool in $(ARM) qemu-aarch64; do command -v $$tool > /dev/null || { \
		echo "$$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	mkdir -p $(SANITIZE)
	$(ARM) $(SANITIZE_FLAGS) -O2 -static -DBATCHNORM_ISA=baseline -DBATCHNORM_VECTOR_BYTES=16 \
		csrc/instruction_set.cpp $(SANITIZE_SOURCES) -o $@

# The installation as users have it, in clean environments of every Python that is found.
check-install:
	$(PYTHON) tools/check_install.py

clean:
	rm -rf .venv build dist

.venv/.installed: pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--config-settings=cmake.define.BATCHNORM_WERROR=ON --editable ".[dev]"
	touch $@
