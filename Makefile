# `make help` lists the commands. The environment lives in .venv and is made once; it is renewed when pyproject.toml changes.
SHELL := bash
PYTHON ?= python3
PROFILE ?= full
BIN := .venv/bin
# stamps: the package is installed; so are the tools for notebooks and tests
PACKAGE := .venv/.package
TOOLS := .venv/.tools

.PHONY: help demo figures gpu test stranger cover install lab docs export readme full hooks clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(PACKAGE)  ## train a small DINO on generated pictures and show what it has learnt (minutes, on a CPU)
	$(BIN)/dino-edu demo --out runs/demo

figures: $(PACKAGE)  ## draw the README's picture anew, from the snapshots that ship
	$(BIN)/dino-edu poster --out nbs/images/poster.png --dpi 110

gpu:  ## what one GPU shows, without an environment: make gpu PART=bench IMAGENETTE=FOLDER (data/gpu.sh says more)
	PYTHONPATH=.:$(PYTHONPATH) data/gpu.sh "$(PART)" "$(IMAGENETTE)" "$(or $(OUT),runs/gpu)"

test: $(TOOLS)  ## everything that CI runs: lint, every notebook, the house rules
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

stranger:  ## build the distributions, install the wheel into an empty environment and use it (minutes; fetches what pip fetches)
	tests/stranger.sh $(PYTHON)

cover: $(TOOLS)  ## the same tests, and which lines they reach (slower)
	$(BIN)/python -m pytest --cov -n 2 --dist worksteal

install:  ## make .venv, or bring it up to date
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade -e ".[dev]"
	@touch $(PACKAGE) $(TOOLS)

lab: $(TOOLS)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir nbs

docs: $(TOOLS)  ## build the site from notebooks, docstrings and docs/: open build/docs/index.html
	$(BIN)/python docs/build.py build/docs

export: $(TOOLS)  ## write dino_edu/ from nbs/, and clean the notebooks' metadata
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(TOOLS)  ## write README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --to markdown --output-dir build --output README nbs/index.ipynb \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=hide \
	  --TagRemovePreprocessor.remove_input_tags=hide-input
	sed -E 's#\]\(\.\./#](#g; s#\]\(([0-9a-z_]+\.ipynb|images/)#](nbs/\1#g' build/README.md > README.md

# Papermill writes to build/, so that a run which fails leaves the notebook as it was. It gives every cell a list of tags: the empty ones go,
# and so do widgets with their state: nobody can move them on a page.
full: $(TOOLS)  ## run notebooks in the full profile and keep their outputs: make full NB=06
	@test -n "$(NB)" || { echo "Which notebook? For example: make full NB=06"; exit 1; }
	@mkdir -p build
	set -e; for path in nbs/$(NB)*.ipynb; do name=$$(basename $$path); \
	  $(BIN)/papermill $$path build/$$name -p profile $(PROFILE) --cwd nbs; \
	  $(BIN)/jupyter nbconvert --to notebook --output-dir nbs --output $$name build/$$name \
	    --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=injected-parameters \
	    --TagRemovePreprocessor.remove_all_outputs_tags=widget \
	    --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.clear_cell_metadata=False \
	    --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec; \
	  $(BIN)/nbdev_clean --fname $$path; \
	  perl -0pi -e 's/\{\s*"tags": \[\]\s*\}/{}/g' $$path; done

hooks: $(TOOLS)  ## install nbdev's git and Jupyter hooks (they write into your Jupyter settings)
	$(BIN)/nbdev_install_hooks

clean:  ## remove what can be made again, except .venv and runs/
	rm -rf build dist *.egg-info .coverage* .pytest_cache .ruff_cache nbs/.last_checked
	find dino_edu nbs tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(PACKAGE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	@touch $@

$(TOOLS): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $(PACKAGE) $@
