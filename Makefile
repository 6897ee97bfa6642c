# Words for pytest: make fast ARGS='-n 4 -k mining'
ARGS = -n 2

.PHONY: help fast test lint format docs site

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

fast:  ## the tests that are not slow
	pytest $(ARGS)

test:  ## all tests; those of a GPU are skipped without one
	pytest -m '' $(ARGS)

lint:  ## everything that is checked without running the code
	ruff check .
	ruff format --check .
	mypy

format:  ## repair what ruff can, and lay out the code
	ruff check --fix .
	ruff format .

docs:  ## write docs/flags.md anew from the flags
	python scripts/document_flags.py

site:  ## build the documentation as a site, in site/; mkdocs serve shows it
	mkdocs build
