# Each target sets up what it needs, in .venv.
PYTHON ?= python3
# the version that is tested; another build or version: make TORCH=torch==2.12.0
TORCH ?= torch==2.13.0
# scripts are run by path: the repository root is never on sys.path
export PYTHONSAFEPATH = 1
# what torch.compile makes is not shared with other versions of PyTorch, nor between kinds of processors
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/build/inductor
# a process of tests on each CPU, a thread in each process; where there are more, they don't spin while they wait
THREADS = 1
TEST = OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n auto

# what makes a processor act like one without vector instructions beyond SSE, and like one without AVX-512
sse = ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem \
	FASTMIM_ISA=portable
avx2 = ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell \
	FASTMIM_ISA=avx2
CPUS = sse $(if $(shell grep -sl avx2 /proc/cpuinfo),avx2)
NUMERICAL = tests/ops tests/nn tests/models tests/interop tests/train/test_loop.py \
	tests/kernels/cpu tests/kernels/test_reference.py tests/support

# Python and packages of the machine that a flight goes to (benchmarks/gpu/README.md)
PYTHON312 ?= $(or $(shell python3.12 -c "import sys; print(sys.executable)" 2>/dev/null),$\
	$(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12))))
FLIGHT ?= .venv-rehearse/bin/python
FLY = PYTHONPATH=$(CURDIR) $(FLIGHT)
EXTENSIONS = $(patsubst %,fastmim/%.cpython-312-x86_64-linux-gnu.so,_C _CUDA _PLANS)

.PHONY: throughput test faults placement interpret lower runner test-cpus numerical test-all test-oldest
.PHONY: gpu-report rehearse carry sanitize lint docs pictures clean

throughput: .venv/ready
	.venv/bin/python benchmarks/throughput.py $(ARGS)

test: .venv/ready lint
	$(TEST) $(ARGS)
	$(MAKE) placement
	$(MAKE) interpret
	$(MAKE) lower
	$(MAKE) runner

# every input that once gave a wrong result, no result, or an unclear error: part of the suite
faults: .venv/ready
	$(TEST) -m fault $(ARGS)

# the op suite of a device on tensors without values: none of the CPU beside one of the device
placement: .venv/ready
	FASTMIM_TEST_DEVICE=meta $(TEST) tests/ops $(ARGS)

# what other kernels don't change: the op as the compiler sees it, derivatives in float64, which are the reference's
ELSEWHERE = not compile and not threads and not gradcheck and not second_derivative

# the op suite on the Triton kernels, in Triton's interpreter
interpret: .venv/ready
	FASTMIM_TEST_KERNELS=triton TRITON_INTERPRET=1 $(TEST) tests/ops -k "$(ELSEWHERE)" $(ARGS)

# values alone, which are not the kernels', or launches that others have too
VALUES = not opcheck and not fuzz and not same_bits and not extreme and not nan_stays and not checkpoint and \
	not beyond_1024_keys and not far_below_zero

# every kernel that the op suite launches on a GPU, compiled for sm_90 to Triton's IR, where errors of types show;
# FASTMIM_TEST_MACHINE_CODE=1: to machine code, and for sm_80 and sm_100 to the IR
lower: .venv/ready
	FASTMIM_TEST_DEVICE=cpu $(TEST) tests/ops -k "$(VALUES)" $(ARGS)

# the op suite on the CUDA C++ kernels, run on the CPU by tests/kernels/cuda/host
runner: .venv/ready
	FASTMIM_TEST_KERNELS=cuda $(TEST) \
	$(addprefix tests/ops/test_,masking.py patches.py attention.py loss.py) -k "$(ELSEWHERE) and not 2_31" $(ARGS)

# the suites that compute, as lesser processors run them, with one thread and with two
test-cpus: .venv/ready
	$(MAKE) numerical THREADS=2
	$(foreach cpu,$(CPUS),$(foreach threads,1 2, \
	env $($(cpu)) TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor/$(cpu) $(MAKE) numerical THREADS=$(threads) &&)) true

numerical: .venv/ready
	$(TEST) $(NUMERICAL) $(ARGS)
	$(MAKE) interpret

test-all: .venv/ready lint
	FASTMIM_TEST_ALL=1 $(TEST) $(ARGS)
	FASTMIM_TEST_MACHINE_CODE=1 $(MAKE) lower

# everything there is to know of one GPU, into benchmarks/results; with what is installed, so that it needs no network
gpu-report:
	PYTHONPATH="$(CURDIR)" $(or $(wildcard .venv/bin/python),$(PYTHON)) benchmarks/gpu_report.py $(ARGS)

# a flight from end to end at tiny sizes on the CPU, with the packages of a machine with a GPU, and what it takes along
rehearse: carry
	$(FLY) benchmarks/flight.py first --rehearse --seconds 1800 --out build/rehearsal
	$(FLY) benchmarks/flight.py second --rehearse --seconds 1800 --first build/rehearsal/first.jsonl --out build/rehearsal

# what is built here to be carried to a machine with a GPU; skips what is built
carry: build/extensions-312
	mkdir -p build/flight
	$(FLY) benchmarks/gpu/triton_cache.py fill build/flight/triton.tar.gz
	$(FLY) benchmarks/gpu/carried.py build/flight $(EXTENSIONS)

# for one Python and one architecture; they stand beside those of other Pythons
build/extensions-312: $(filter .venv-rehearse/%,$(FLIGHT:bin/python=ready)) setup.py $(wildcard csrc/* csrc/*/*)
	PATH=$(CURDIR)/$(dir $(FLIGHT)):$$PATH FASTMIM_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0a \
	$(FLIGHT) setup.py -q build_ext --inplace
	touch $@

.venv-rehearse/ready:
	test -x .venv-rehearse/bin/python || "$(PYTHON312)" -m venv .venv-rehearse
	# Triton 3.6's interpreter fails with NumPy 2.3, which the machine has and the rehearsal can't have
	.venv-rehearse/bin/python -m pip install -q torch==2.11.0 triton==3.6.0 "transformers==5.17.*" "numpy<2.3" \
		accelerate hypothesis matplotlib ninja pillow pybind11 pytest pytest-benchmark pytest-xdist safetensors \
		scikit-image scikit-learn "setuptools>=77" tensorboard tqdm
	.venv-rehearse/bin/python -m pip install -q --no-deps timm torchvision==0.26.0
	touch $@

# the interpreter suite and the sm_90 compile gate on the oldest torch and Triton that are served
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q torch==2.11.0 triton==3.6.0 "numpy<2.3" "setuptools>=77" pytest pytest-xdist hypothesis
	FASTMIM_BUILD_CPP=0 .venv-oldest/bin/python -m pip install -q --no-deps --no-build-isolation .
	.venv-oldest/bin/python benchmarks/compiled.py --architectures 90 --json /dev/null
	FASTMIM_TEST_KERNELS=triton TRITON_INTERPRET=1 .venv-oldest/bin/python -m pytest -n auto tests/ops $(ARGS)

# the op suite on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer
sanitize: .venv/ready
	rm -rf build/sanitize
	FASTMIM_SANITIZE=1 .venv/bin/python -m pip install -q --no-deps --no-build-isolation --target build/sanitize .
	PYTHONPATH=build/sanitize LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	.venv/bin/python -m pytest tests/ops tests/models/test_masks.py tests/kernels/test_plans.py -k "not compile" $(ARGS)

# needs no compiler, nor the package installed
lint: .venv/lint
	.venv/bin/clang-format --dry-run -Werror csrc/*.cpp csrc/*/* tests/kernels/cuda/host/*.h tests/kernels/cuda/host/*.cpp tests/kernels/cuda/host/*.inl
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# the site, in build/docs
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "open build/docs/index.html, or: .venv-docs/bin/mkdocs serve"

# the charts of docs/img from results files
pictures: .venv/ready
	.venv/bin/python benchmarks/draw.py

.venv-docs/ready: Makefile
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	# ruff formats the signatures
	.venv-docs/bin/python -m pip install -q mkdocs-material "mkdocstrings[python]" ruff
	touch $@

# torch for its types
.venv/lint: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q "$(TORCH)" numpy clang-format mypy ruff
	touch $@

.venv/ready: .venv/lint setup.py $(wildcard csrc/* csrc/*/*)
	.venv/bin/python -m pip install -q "setuptools>=77" ninja pybind11
	.venv/bin/python -m pip install -q --no-build-isolation -e ".[test]"
	# without what they depend on: beside a CPU build of torch, torchvision breaks itself and transformers
	.venv/bin/python -m pip install -q --no-deps timm lightly \
		"xformers; sys_platform == 'linux' and platform_machine == 'x86_64'"
	touch $@

clean:
	rm -rf .venv .venv-docs .venv-oldest .venv-rehearse build dist *.egg-info
