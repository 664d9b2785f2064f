# make demo   train a small video GAN stage by stage and write its videos
# make test   run the tests
# make test-all   those too that take long: end to end, and whose parts other tests cover
# make miniature   train and measure the paper's comparisons on the sample set (an hour, two cores)
# make i3d    fetch the I3D network's weights into data/i3d, for FVD (47 MB, once)
# make lint   check style and types
# make clean  remove the environment, the caches and what the demo made (other runs and data stay)
#
# Needs Python 3.11 or newer and a C++ compiler, nothing else. The environment is made in .venv
# on first use and again when setup.py or constraints.txt changes; csrc/ is built when it changes.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
MINIATURE_ARGS ?=

# Paths are relative throughout: the checkout may lie in a folder with spaces in its name.
RUN := .venv/bin/python
INSTALLED := .venv/.installed
BUILT := .venv/.built
INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all miniature i3d lint clean help
.DELETE_ON_ERROR:

demo: $(BUILT)
	@$(RUN) -m engine.demo $(DEMO_ARGS)

# One torch thread per worker: more only make the workers wait for each other. A file's tests go to
# one worker, so that fixtures which take minutes are made once; not those with the fewest tests
# last, which may be the longest.
test: $(BUILT)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest tests -m "not long" $(PYTEST_ARGS)

test-all: $(BUILT)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest tests $(PYTEST_ARGS)

miniature: $(BUILT)
	@$(RUN) -m benchmarks.miniature $(MINIATURE_ARGS)

i3d: $(BUILT)
	@$(RUN) -m engine.evaluation.i3d_weights

lint: $(BUILT)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

help:
	@sed -n '/^# make/s/^# //p' Makefile

clean:
	rm -rf .venv build dist *.egg-info runs/demo runs/demo-quick runs/demo-long data/sample data/sample-held-out
	rm -rf kernels/_csrc*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find engine kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# An installation, if it is what changed, has built csrc/ too.
$(BUILT): $(INSTALLED) $(wildcard csrc/*)
	@$(if $(filter $(INSTALLED),$?),,echo "Building csrc/" && $(RUN) setup.py -q build_ext --inplace)
	@touch $@

# torch comes first and the rest is built without isolation, because DeepSpeed's build imports it.
$(INSTALLED): setup.py constraints.txt
	@command -v "$(PYTHON)" > /dev/null || \
	  { echo "$(PYTHON) was not found; install Python 3.11 or newer, or: make PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$("$(PYTHON)" --version) is too old; 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "$(PYTHON) lacks the venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@command -v "$(firstword $(CXX))" > /dev/null || \
	  { echo "no C++ compiler ($(CXX)); on Debian and Ubuntu: apt install g++" >&2; exit 2; }
	@echo "Making .venv (once; torch and DALI are large, so this takes some minutes)"
	@"$(PYTHON)" -m venv --clear .venv
	@echo "  installing torch"
	@$(INSTALL) setuptools wheel torch
	@echo "  installing DeepSpeed, DALI, PyAV and the tools"
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@
