# What one types. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
CARGO_FLAGS ?= --locked
# A model for the demo: a folder or a name that vLLM knows. Empty: a small random one is made.
MODEL ?=
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
# For gpu-check: a Python that has vLLM for CUDA. Greenroom's wheel and pytest are installed beside it.
GPU_PYTHON ?=

TOOLS := .venv-tools
UV := $(TOOLS)/bin/uv
REQUIREMENTS := tests/python/requirements
# vLLM's newest release, before there is a CPU build of it: its Python sources, over .venv.
NEXT := target/vllm-0.33
# The build with fault points, in vLLM's Python.
FAULTS_PATH := target/site-faults:tests/python
FAULTS_PYTEST := GREENROOM_COMMAND=target/site-faults/bin/greenroom .venv/bin/python -m pytest
BUILT := $(or $(CARGO_TARGET_DIR),target)
CARGO_TEST = $(if $(shell cargo nextest --version 2>/dev/null),cargo nextest run,cargo test) $(CARGO_FLAGS)
# AddressSanitizer needs a nightly toolchain, fuzzing itself does not.
NIGHTLY = $(firstword $(shell rustup toolchain list 2>/dev/null | grep -o '^nightly[^ ]*'))
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
CARGO_FUZZ_VERSION := 0.13.2
CARGO_FUZZ := $(BUILT)/tools/cargo-fuzz-$(CARGO_FUZZ_VERSION)/bin/cargo-fuzz
FUZZ_TARGETS ?= frames plan bodies config machine
# Of fuzzing, for each target.
SECONDS ?= 20
SANITIZER ?= $(if $(NIGHTLY),address,none)
# Left out: valgrind shows a process maps of its own making, and one test reads them.
UNSAFE_TESTS := arena presence device host conformance thread --skip forked_children
# vLLM 0.32 wants Python 3.11 or newer; uv takes one from the machine or fetches it.
VLLM_PYTHON := >=3.11,<3.15
export UV_NO_PROGRESS := 1
export PYO3_PYTHON := $(abspath $(TOOLS)/bin/python)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- for users

.PHONY: demo
demo: install ## build, install vLLM (CPU build), show TTFT after a tool wait: resident, recompute, reactive, hinted
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
	  echo "This machine has a GPU. The demo does not use it: it runs vLLM's CPU build."; fi
	PYTHONPATH=tests/python .venv/bin/python -m demo $(if $(MODEL),--model '$(MODEL)') $(DEMO_FLAGS)

.PHONY: wheel
wheel: $(TOOLS)/.ready ## target/wheels/greenroom-*.whl: the Python package, the native module and the `greenroom` command
	$(call build-wheel,--release,release,target/wheels)

.PHONY: install
install: wheel .venv/.ready ## the wheel, installed beside vLLM in .venv
	$(UV) pip install --quiet --no-deps --reinstall --python .venv target/wheels/greenroom-*.whl

# ---- for developers

.PHONY: test
test: $(TOOLS)/.ready ## what CI runs: `check`, the Rust tests as users build it, then what needs a real vLLM (50 minutes on 2 cores)
	@# Installing vLLM is mostly waiting, the checks that do without it mostly computing.
	mkdir -p $(BUILT)
	$(MAKE) --no-print-directory venvs >$(BUILT)/venvs.log 2>&1 & venvs=$$!; trap 'kill $$venvs 2>/dev/null || true; wait || true' EXIT; \
	  $(MAKE) --no-print-directory lint check-rust check-plain check-models check-python; \
	  wait $$venvs || { cat $(BUILT)/venvs.log; exit 1; }
	$(MAKE) --no-print-directory check-harness check-harness-next check-fuzz install install-026
	.venv-026/bin/python -m pytest tests/python/unit -m vllm $(PYTEST_FLAGS)
	.venv/bin/python -m pytest tests/python -m vllm $(PYTEST_FLAGS)

.PHONY: check
check: lint check-rust check-models check-python check-schedulers ## the inner loop; vLLM is used only if it is installed

.PHONY: lint
lint: $(TOOLS)/.ready ## format and lints of Rust and Python, nothing is changed
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	$(TOOLS)/bin/ruff check --quiet tests/python benches/serving bindings
	$(TOOLS)/bin/ruff format --quiet --check tests/python benches/serving bindings
	MYPYPATH=bindings/python:tests/python:benches $(TOOLS)/bin/mypy --config-file tests/python/pyproject.toml tests/python benches/serving
	if [ -d bindings/python ]; then cd bindings && ../$(TOOLS)/bin/mypy; fi

.PHONY: check-rust
check-rust: ## Rust tests with `strict` and every fault point; those for GPUs on the stand-in driver
	$(CARGO_TEST) --all-targets --features strict,faults
	mkdir -p $(BUILT)/stand-in
	ln -sf ../debug/deps/libstand_in_driver.so $(BUILT)/stand-in/libcuda.so.1
	LD_LIBRARY_PATH=$(abspath $(BUILT)/stand-in) STAND_IN_PAGEABLE=1 REQUIRE_GPU=1 GREENROOM_ROUNDS=40 \
	  cargo test $(CARGO_FLAGS) --quiet -p greenroom-tests --features strict,faults --test gpu -- --skip layouts

.PHONY: check-plain
check-plain: ## the same tests, and those in the documentation, of the build that users get
	$(CARGO_TEST) --all-targets
	cargo test $(CARGO_FLAGS) --doc --quiet

.PHONY: check-models
check-models: ## the link's epoch word and the copy thread under thousands of interleavings (GREENROOM_SCHEDULES=n: more)
	$(CARGO_TEST) -p greenroom-cuda --lib --features models models::
	$(CARGO_TEST) -p greenroom-sidecar --lib --no-default-features --features models models::

.PHONY: check-python
check-python: $(TOOLS)/.ready ## the native module against its stub, the Python tests that need no vLLM
	$(call build-wheel,,debug,target/wheels-debug)
	$(UV) pip install --quiet --no-deps --reinstall --python $(TOOLS) target/wheels-debug/greenroom-*.whl
	$(TOOLS)/bin/stubtest greenroom._native
	$(TOOLS)/bin/python -m pytest tests/python -m "not vllm" $(PYTEST_FLAGS)

.PHONY: check-schedulers
check-schedulers: ## a short part of `check-harness`, if vLLM is installed
	@if [ -e .venv/.ready ]; then \
	  $(MAKE) --no-print-directory check-harness GREENROOM_TURNS=600 PYTEST_FLAGS='-q -k every_block_read'; \
	else echo "check-schedulers: left out, it wants vLLM in .venv (make install)"; fi

.PHONY: check-harness
check-harness: faults-wheel ## random agents on vLLM's real schedulers, with faults (GREENROOM_TURNS=100000: the long run)
	PYTHONPATH=$(FAULTS_PATH) $(FAULTS_PYTEST) tests/python/harness $(PYTEST_FLAGS)

.PHONY: check-harness-next
check-harness-next: faults-wheel $(NEXT)/.ready ## a part of `check-harness` on the Python sources of vLLM 0.33 (PYTEST_FLAGS='-k ""': all)
	@cd / && PYTHONPATH=$(abspath $(NEXT)) $(abspath .venv/bin/python) -c 'import importlib.util, sys; sys.exit("$(NEXT)/" not in importlib.util.find_spec("vllm").origin)' || \
	  { echo "check-harness-next: $(NEXT) is incomplete: remove it" >&2; exit 1; }
	VLLM_TARGET_DEVICE=cpu GREENROOM_TURNS=$${GREENROOM_TURNS:-1200} \
	  PYTHONPATH=$(NEXT):$(FAULTS_PATH) \
	  $(FAULTS_PYTEST) tests/python/harness tests/python/unit/test_compat.py tests/python/unit/test_layouts.py \
	  -k 'not two_ranks and not fall_than' $(PYTEST_FLAGS)

# uv fetches the wheel once and keeps it. Compiled for CUDA it is of no use here, and vLLM does without.
$(NEXT)/.ready: $(REQUIREMENTS)/vllm-0.33.txt | $(TOOLS)/.ready .venv/.ready
	rm -rf $(NEXT)
	$(UV) pip install --quiet --no-deps --require-hashes --python .venv --python-platform x86_64-manylinux_2_28 --target $(NEXT) -r $< || \
	  { echo "check-harness-next: vLLM 0.33 could not be fetched, so nothing was tested on it" >&2; exit 1; }
	find $(NEXT) -name '*.so' -delete
	touch $@

.PHONY: faults-wheel
faults-wheel: $(TOOLS)/.ready .venv/.ready ## the build with fault points, unpacked in target/site-faults
	$(call build-wheel,--profile faults --features strict --features faults,faults,target/wheels-faults)
	rm -rf target/site-faults
	$(UV) pip install --quiet --no-deps --python .venv --target target/site-faults target/wheels-faults/greenroom-*.whl

.PHONY: check-memory
check-memory: ## the arena and the host copies under valgrind, and under AddressSanitizer if there is a nightly toolchain
	env $(shell echo CARGO_TARGET_$(HOST)_RUNNER | tr a-z- A-Z_)='valgrind --quiet --error-exitcode=9' \
	  cargo test $(CARGO_FLAGS) -p greenroom-kvstore -p greenroom-cuda --lib -- $(UNSAFE_TESTS)
ifneq ($(NIGHTLY),)
	RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$(BUILT)/sanitize-address \
	  cargo +$(NIGHTLY) test $(CARGO_FLAGS) --target $(HOST) -p greenroom-kvstore -p greenroom-cuda --lib
endif

.PHONY: check-fuzz
check-fuzz: ## a short `make fuzz`, where there is the C++ compiler that libFuzzer is built with
	@if command -v c++ >/dev/null; then $(MAKE) --no-print-directory fuzz SECONDS=10 SANITIZER=none; \
	else echo "check-fuzz: left out, it wants a C++ compiler (c++)"; fi

.PHONY: fuzz
fuzz: $(CARGO_FUZZ) ## libFuzzer on everything that strangers send, SECONDS=20 on each of FUZZ_TARGETS
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p $(BUILT)/fuzz/found/$$target; \
	  $(if $(filter none,$(SANITIZER)),,RUSTUP_TOOLCHAIN=$(NIGHTLY)) $< run --fuzz-dir tests/fuzz --target-dir $(BUILT)/fuzz --sanitizer $(SANITIZER) \
	    $$target $(BUILT)/fuzz/found/$$target tests/fuzz/corpus/$$target -- \
	    -max_total_time=$(SECONDS) -max_len=8192 -timeout=5 -rss_limit_mb=1024 -print_final_stats=1 || exit 1; \
	done

$(CARGO_FUZZ):
	cargo install --quiet --locked --root $(dir $@)/.. cargo-fuzz --version $(CARGO_FUZZ_VERSION)

# ROUNDS=, MINUTES= and SEED= are handed on where they are given.
campaign-flags = $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

.PHONY: faults
faults: install faults-wheel ## real servers killed, stopped and starved in random order (≤ 40 minutes; ROUNDS=, MINUTES=, SEED=)
	PYTHONPATH=tests/python .venv/bin/python -m campaign faults $(campaign-flags)

.PHONY: soak
soak: install faults-wheel ## the same for long: memory, descriptors, slots and latency over time, and a verdict (MINUTES=60, SEED=)
	PYTHONPATH=tests/python .venv/bin/python -m campaign soak $(campaign-flags)

.PHONY: gpu-check
gpu-check: ## what needs a GPU; figures go to benches/results (GPU_PYTHON=: a Python with vLLM for CUDA; REQUIRE_GPU=1)
	@if ! nvidia-smi -L >/dev/null 2>&1; then \
	  echo "gpu-check: nothing was tested, nvidia-smi shows no GPU"; [ "$${REQUIRE_GPU:-0}" != 1 ]; \
	else $(MAKE) --no-print-directory gpu-check-here; fi

.PHONY: gpu-check-here
gpu-check-here: wheel
	$(if $(GPU_PYTHON),$(UV) pip install --quiet --python '$(GPU_PYTHON)' --reinstall-package greenroom target/wheels/greenroom-*.whl pytest)
	tests=$$(cargo test $(CARGO_FLAGS) --release -p greenroom-tests --test gpu --no-run --message-format=json | \
	  $(TOOLS)/bin/python -c 'import json, sys; print(*(m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")))') && \
	GPU_TESTS=$$tests GREENROOM_COMMAND=$(abspath $(BUILT)/release/greenroom) GPU_PYTHON='$(GPU_PYTHON)' tests/gpu/check.sh

.PHONY: bench
bench: ## the benchmarks in benches/; figures as JSON in target/bench-*.json
	cargo build $(CARGO_FLAGS) --release -p greenroom-sidecar --bin greenroom
	for name in store hooks sidecar; do \
	  cargo run $(CARGO_FLAGS) --release -p greenroom-benches --bin bench-$$name -- --json target/bench-$$name.json; \
	done
	$(BUILT)/release/greenroom bench copy --engine host --json target/bench-copy.json

.PHONY: bench-serving
bench-serving: install ## hint → copy, and throughput with nothing to reuse, on real vLLM (≤ 60 minutes); JSON as of `bench`
	status=0; \
	for name in hint-latency throughput; do \
	  PYTHONPATH=tests/python:benches .venv/bin/python -m serving $$name --json target/bench-$$name.json || status=1; \
	done; \
	exit $$status

.PHONY: fmt
fmt: $(TOOLS)/.ready ## format Rust and Python
	cargo fmt --all
	$(TOOLS)/bin/ruff check --quiet --fix-only tests/python benches/serving bindings
	$(TOOLS)/bin/ruff format --quiet tests/python benches/serving bindings

.PHONY: lock
lock: $(TOOLS)/.ready ## resolve the Python requirements anew
	cd $(REQUIREMENTS) && uv="../../../$(UV) pip compile --quiet --universal --no-header" && \
	  $$uv --python-version 3.10 tools.in -o tools.txt && \
	  for v in 0.32 0.26; do $$uv --no-annotate --python-version 3.11 --override vllm-$$v.overrides vllm-$$v.in -o vllm-$$v.txt; done

.PHONY: clean
clean: ## remove what was built; the Python environments stay
	cargo clean
	rm -rf bindings/greenroom.data target

# ---- environments: made once, and again when their lock file changes

.PHONY: venvs
venvs: .venv/.ready .venv-026/.ready ## both vLLM versions, without Greenroom

.PHONY: install-026
install-026: wheel .venv-026/.ready
	$(UV) pip install --quiet --no-deps --reinstall --python .venv-026 target/wheels/greenroom-*.whl

$(TOOLS)/.ready: $(REQUIREMENTS)/tools.txt
	if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(TOOLS) && uv pip install --quiet --python $(TOOLS) -r $<; \
	else \
	  $(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv: install it (Debian: python3-venv), or uv" >&2; exit 1; }; \
	  $(PYTHON) -m venv $(TOOLS) && $(TOOLS)/bin/python -m pip install --quiet -r $<; \
	fi
	touch $@

.venv/.ready: $(REQUIREMENTS)/vllm-0.32.txt | $(TOOLS)/.ready
	$(call install-vllm,.venv,$<)

.venv-026/.ready: $(REQUIREMENTS)/vllm-0.26.txt | $(TOOLS)/.ready
	$(call install-vllm,.venv-026,$<)

# $(1) environment, $(2) lock file. The lock names every package: no resolving, which could not have vLLM's torch.
# Compiled now: where PYTHONDONTWRITEBYTECODE is set, each process of each vLLM would compile 20,000 files anew.
define install-vllm
@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || { echo "vLLM's CPU build needs libnuma.so.1, which is not in its wheel: install it (Debian: libnuma1)" >&2; exit 1; }
@echo "Installing vLLM into $(1) (about 6 GB, once) …"
$(UV) venv --quiet --allow-existing --python '$(VLLM_PYTHON)' $(1)
$(UV) pip install --quiet --no-deps --compile-bytecode --python $(1) -r $(2)
touch $(1)/.ready
endef

# $(1) profile flag, $(2) profile folder, $(3) folder of the wheel
define build-wheel
cargo build $(CARGO_FLAGS) $(1) -p greenroom-sidecar --bin greenroom
install -D -m 755 $(BUILT)/$(2)/greenroom bindings/greenroom.data/scripts/greenroom
rm -f $(3)/greenroom-*.whl
$(TOOLS)/bin/maturin build --quiet $(CARGO_FLAGS) $(1) --manifest-path bindings/Cargo.toml --interpreter $(TOOLS)/bin/python --out $(3)
endef
