# make demo   runs a recipe on the example pool with the core package only
# make test   style, types and tests
# make test-all   the same, and the tests marked slow: full sizes, random kills, more examples, a browser (as in CI)
# make energon  Megatron Energon reads what export and reshard write; apart from the other tests, as it pins other packages
# make bench  the benchmarks of docs/performance.md (minutes; needs 8 GB of disk)
# make nightly  a few of them, compared with the stored ratios of benchmarks/thresholds.json
# make fix    formats the code
# make man    writes the man pages to man/man1, from the commands
# make dist   builds the wheel and the source distribution in dist; the same commit gives the same bytes
# make docs   builds the documentation as a site in out/site

PYTHON ?= python3
DEMO = .venv-demo/bin
TEST = .venv/bin
DIST = .venv-dist/bin
ENERGON = .venv-energon/bin
OUT = out/demo
EPOCH = $(shell git log -1 --format=%ct 2>/dev/null || echo 1580601600)
SITE = import sysconfig; packages = sysconfig.get_path("purelib")
NEEDS = import sys; sys.version_info >= (3, 11) or sys.exit("thresher needs Python 3.11 or newer: make PYTHON=python3.11")

# Without bytecode, pytest would rewrite every test and each command of a test would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all energon check fix bench nightly man dist docs clean

demo: .venv-demo/ready
	@rm -rf $(OUT)
	@$(DEMO)/thresher inspect examples/twemoji --cache $(OUT)/cache
	@echo
	@$(DEMO)/thresher run examples/demo.toml examples/twemoji -o $(OUT)/selection --cache $(OUT)/cache
	@echo
	@echo "Explanation for one image:"
	@$(DEMO)/thresher explain $(OUT)/selection 1f44b-1f3fd
	@echo
	@$(DEMO)/thresher export $(OUT)/selection --as open_clip -o $(OUT)/train.csv
	@$(DEMO)/thresher report $(OUT)/selection -o $(OUT)/report.html --title "Twemoji, pruned"
	@echo "Open $(CURDIR)/$(OUT)/report.html in a browser."

test: .venv/ready check
	$(TEST)/pytest -q -n auto --dist worksteal

test-all: .venv/ready check
	$(TEST)/pytest -q -n auto --dist worksteal -m "" --hypothesis-profile full --durations 40

energon: .venv-energon/ready
	$(ENERGON)/python -m pytest -q tests/export/formats/against_energon.py

check: .venv/ready
	$(TEST)/ruff format --check src tests benchmarks examples website
	$(TEST)/ruff check src tests benchmarks examples website
	$(TEST)/mypy
	$(TEST)/basedpyright --pythonpath $(TEST)/python

fix: .venv/ready
	$(TEST)/ruff format src tests benchmarks examples website
	$(TEST)/ruff check --fix src tests benchmarks examples website

bench: .venv/ready
	$(TEST)/pip install -q --group bench
	$(TEST)/python benchmarks/run.py

nightly: .venv/ready
	$(TEST)/pip install -q --group bench
	$(TEST)/python benchmarks/nightly.py

man: .venv-dist/ready
	@SOURCE_DATE_EPOCH=$(EPOCH) PYTHONPATH=src $(DIST)/python website/man.py man/man1

dist: man
	rm -rf dist
	umask 022 && SOURCE_DATE_EPOCH=$(EPOCH) $(DIST)/python -m build -q -o dist .
	@ls -l dist

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(TEST)/mkdocs build --quiet --strict -f website/mkdocs.yml -d ../out/site
	@echo "Open $(CURDIR)/out/site/index.html in a browser."

clean:
	rm -rf .venv .venv-demo .venv-dist .venv-energon man dist $(OUT)

# Marks a finished installation; an interrupted one starts again from the beginning.
.venv-demo/ready: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv --clear .venv-demo
	$(DEMO)/python -m pip install -q .
	@touch $@

.venv-dist/ready: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv --clear .venv-dist
	$(DIST)/python -m pip install -q 'build>=1.2' .
	@touch $@

.venv/ready: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv --clear .venv
	$(TEST)/python -m pip install -q --upgrade 'pip>=25.1'
	$(TEST)/python -m pip install -q -e '.[train,lightning,embed,surrogate]' --group test
	$(TEST)/python -m pip install -q --no-deps mosaicml-streaming==0.13.0
	@touch $@

# Packages of the tests are taken from their environment; only Energon and what it pins are installed, some 40 MB.
.venv-energon/ready: .venv/ready
	$(TEST)/python -m venv --clear .venv-energon
	@$(TEST)/python -c '$(SITE); print(f"import site; site.addsitedir({packages!r})")' > .venv-energon/tests.pth
	@mv .venv-energon/tests.pth "$$($(ENERGON)/python -c '$(SITE); print(packages)')"
	$(ENERGON)/python -m pip install -q --disable-pip-version-check megatron-energon==7.4.1
	@touch $@
