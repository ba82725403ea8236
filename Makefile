# The two commands of the README. Both need only python3 >= 3.11 and make; both create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest

.PHONY: gpu demo test test-oldest nightly mutants deploy-check audit browser format clean
demo: $(STAMP)
	$(BIN)/python -m demo

test: $(STAMP) browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --durations=30

.PHONY: docs release-check
# The documentation site, into build/site; warnings are errors. Executes the notebooks (under two minutes).
docs: $(STAMP)
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/site
	@echo build/site/index.html

# Before a release: versions agree, the changelog has its date, generated files are current, everything is committed; then
# the tests and the site. Afterwards: git tag vVERSION.
release-check: $(STAMP)
	$(BIN)/python docs/release_check.py
	$(MAKE) test docs

# The tests on the oldest versions of every dependency that pyproject.toml allows; that these find newer ones deprecated
# is no fault of ours.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --durations=30 -W default::DeprecationWarning

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable '.[dev]'
	touch $@

# With a GPU, in under ten minutes: its tests, then the benchmarks of a step and of the teacher's forward pass.
gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python -m benchmarks.step --device cuda --amp bfloat16 --batch 64 --samples 256 --repeats 20 \
		--teacher swin_large_patch4_window7_224 --student resnet50
	$(BIN)/python -m benchmarks.cache_gpu

.PHONY: bench bench-report study study-gpu
# The benchmarks that need neither other software nor images, and their page, into build/bench; for an idle machine.
bench: $(STAMP)
	mkdir -p build/bench
	for name in store http step tar_index preset_flops; do \
		$(BIN)/python -m benchmarks.$$name > build/bench/$$name.json || exit 1; done
	$(BIN)/python -m benchmarks.performance --results build/bench --docs build/bench
	@echo build/bench/performance.md

# docs/performance.md and docs/results.md, with its figures, from what is recorded.
bench-report: $(STAMP)
	$(BIN)/python -m benchmarks.performance
	$(BIN)/python -m benchmarks.study report

# The study (docs/results.md) on the CPU, or on one GPU for MINUTES; both resume. DATA: CIFAR-100 as webdataset tars.
OUT ?= build/study
MINUTES ?= 12
study: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study run --data $(DATA) --out $(OUT)

study-gpu: $(STAMP)
	OMP_NUM_THREADS=1 timeout -s INT $(MINUTES)m $(BIN)/python -m benchmarks.study run --data $(DATA) --out $(OUT) \
		--tier gpu || [ $$? = 124 ]
	$(BIN)/python -m benchmarks.study collect --data $(DATA) --out $(OUT) --tier gpu
	$(BIN)/python -m benchmarks.study report

# Ten times the random requests made from the service's OpenAPI, and the notebooks' results.
nightly: $(STAMP)
	$(BIN)/python -m pytest -m notebooks tests/e2e/test_notebooks.py
	OMP_NUM_THREADS=1 SERVICE_CASES=6000 $(BIN)/python -m pytest tests/unit/teacher_service/test_serving_schema.py

# Mutation testing of the losses, the data path, the codecs and the commits; SAMPLE=0 tries every mutant (hours).
SAMPLE ?= 40
mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants --sample $(SAMPLE)

# What deploy/ describes, built and run for real as far as this machine allows: images, proxies, units, schedulers. Needs
# root to install Debian packages; STEPS='images install' runs some of it. Logs: build/deploy-check.
deploy-check: $(STAMP)
	PYTHON=$(CURDIR)/$(BIN)/python deploy/check/run $(STEPS)

# Known vulnerabilities and licences of all dependencies, patterns of insecure code, a bill of materials: build/audit.
audit: $(STAMP)
	$(BIN)/python deploy/check/lib/audit.py build/audit

# A Chromium for the tests of the page, where the system has none; without one they are skipped, which the summary says.
browser: $(STAMP)
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	$(BIN)/python -m playwright install chromium >/dev/null 2>&1 || echo "no browser: the page's tests will be skipped"

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "python >= 3.11 is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(OLDEST) demo/out
