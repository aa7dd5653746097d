# Everything runs from .venv, made by the first target that needs it and renewed when its inputs change.
PYTHON ?= python3
# byte code is compiled afterwards on all cores: half the time of letting pip do it on one
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
BUILD_INPUTS = pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test bench gpu lint clean

# threads that wait asleep: a machine with other work to do is slowed down many times over by waiting ones that spin
demo test: export OMP_WAIT_POLICY = passive

demo: .venv/ready
	.venv/bin/jlebm train runs/demo --overwrite

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto

bench: .venv/ready-to-bench
	.venv/bin/jlebm bench

# on a machine that has torch, nvcc and the build's tools already: no .venv, nothing is downloaded
gpu:
	$(PYTHON) benchmarks/gpu/run.py

lint: .venv/ready
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs .venv/bin/clang-format --dry-run --Werror

clean:
	rm -rf .venv build dist *.egg-info jlebm_fast/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks

.venv/ready: $(BUILD_INPUTS)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) torch numpy setuptools wheel pybind11 cmake ninja
	$(PIP) --no-build-isolation --editable '.[train,dev]'
	.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	touch $@

.venv/ready-to-bench: .venv/ready
	$(PIP) --no-build-isolation --editable '.[bench]'
	touch $@
