# make demo and make test do everything, from the environment on. Needs CPython >= 3.10 with venv and headers, a C and
# C++ compiler, pip. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# The model and data of the demo and of the tests are in installed packages: nothing asks the network.
export HF_HUB_OFFLINE := 1

# Threads that spin while they wait make tests many times slower where other programs keep a core busy.
export OMP_WAIT_POLICY ?= PASSIVE

# The stamp carries the kind of build, so that another kind rebuilds. Folders count too: they change when a file goes.
BUILT := $(VENV)/built-portable$(BOFT_PORTABLE)-cuda$(BOFT_CUDA)
SOURCES := setup.py setup_cuda.py pyproject.toml $(shell find csrc)

# Processes that share the tests, file by file. Each has taken 1.2 GB, and takes the threads that torch takes.
PROCESSES := 2

# What make gpu runs after its build.
PART := all

# What make examples runs: folders of examples, all by default. make examples NAMES='vision glue'
NAMES :=

# Releases of PEFT, or folders of its checkouts: make test-peft-versions VERSIONS=0.18.1
VERSIONS := 0.18.1 0.19.1 0.20.0 0.21.2

.PHONY: help build demo examples test test-peft test-peft-versions cuda-check gpu bench plots clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       fine-tune a small pretrained model with BOFT and compare: examples/finetune_text.py'
	@echo 'make examples   run what each examples/*/README.md says under "Run it here"; NAMES="vision glue" runs these two'
	@echo 'make test       run the tests of the C core, the CUDA kernels (on the CPU) and the Python package'
	@echo "make test-peft  run PEFT's own BOFT tests with boft_ext patched in"
	@echo 'make test-peft-versions  the tests of the PEFT patch and the former with each PEFT in VERSIONS'
	@echo 'make cuda-check  compile the CUDA kernels for all architectures and check what came out; needs nvcc, no GPU'
	@echo 'make gpu        with a GPU, for the torch that PYTHON has: build, then PART=tests|ops|layers|model|all'
	@echo 'make bench      measure operators, layers and models beside LoRA, OFT and other forms of BOFT: benchmarks/'
	@echo 'make plots      draw what make bench measured: benchmarks/results/*.png'
	@echo 'make build      only make the environment $(VENV) and build the extension in place'
	@echo 'make clean      remove what the build made; the environment $(VENV) stays'

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -B -c 'import setup; setup.check_tools()'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements-dev.txt
	@touch $@

$(BUILT): $(VENV)/installed $(SOURCES)
	$(PY) -m pip install --no-build-isolation --no-deps -e .
	@rm -f $(VENV)/built-*
	@touch $@

# Toolkits without a disassembler get it from PyPI.
CUOBJDUMP_WHEEL := $(if $(shell command -v nvcc),$(if $(shell command -v cuobjdump),,$(VENV)/cuobjdump))

$(VENV)/cuobjdump: requirements-cuda-check.txt $(VENV)/installed
	rm -rf $@
	$(PY) -m pip install --no-deps --target $@ -r requirements-cuda-check.txt
	@touch $@

# Apart, because PEFT imports it wherever it is installed.
$(VENV)/torchao: requirements-torchao.txt $(VENV)/installed
	rm -rf $@
	$(PY) -m pip install --no-deps --target $@ -r requirements-torchao.txt
	@touch $@

build: $(BUILT)

demo: $(BUILT)
	$(PY) examples/finetune_text.py

# examples is also a folder: .PHONY above.
examples: $(BUILT)
	$(PY) scripts/examples.py $(NAMES)

test: $(BUILT) $(VENV)/torchao
	$(MAKE) -C tests/c check
	$(MAKE) -C tests/cuda check
	$(PY) -m pytest -n $(PROCESSES) --dist loadfile tests
	PYTHONPATH=$(VENV)/torchao $(PY) -m pytest tests/torchao_layers.py

test-peft: $(BUILT)
	$(PY) tests/run_peft_suite.py

test-peft-versions: $(BUILT)
	$(PY) tests/run_peft_versions.py $(VERSIONS)

cuda-check: $(CUOBJDUMP_WHEEL)
	$(PYTHON) tests/cuda/check_cuda.py

# Everything that PART means is in scripts/gpu.py.
gpu:
	$(PYTHON) scripts/gpu.py $(PART)

bench: $(BUILT)
	$(PY) -m benchmarks

plots: $(BUILT)
	$(PY) -m benchmarks.plots

clean:
	rm -rf build dist *.egg-info __pycache__ boft_ext/_build.py boft_ext/*.so $(VENV)/built-*
	find boft_ext tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
	if [ -f tests/c/Makefile ]; then $(MAKE) -C tests/c clean; $(MAKE) -C tests/cuda clean; fi
