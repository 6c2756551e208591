# make book        builds the book into _build/html (sets up .venv the first time)
# make test        runs every chapter as a test, and the package's own tests
# make pages       builds the book and tests every page in a browser: links, search, keyboard, light, dark, phone
# make notebooks   after editing book/NN-*.md: writes the notebooks, runs those whose code changed
# make figures     redraws the diagrams in book/figures
# make check       lint, spelling, pairing of text and notebooks, einops only, mirrored definitions, arrows between modules
# make pdf         prints the book into _build/html/t2t-vit.pdf (needs a Chromium or Chrome; takes minutes)
# make links       asks every page on the web that the book links to
# make colab       runs every chapter as Colab would: its versions, and the package from git (tools/colab_like.sh)
# make address     REPO=owner/name: writes the repository's address wherever it stands
# make elsewhere   runs the tests as other machines would: other processors, threads, Pythons (tools/elsewhere.sh says how)
# make planted     plants mistakes in copies of package and chapters, and says which of them no cell notices (hours)
# make gpu         checks on one GPU what needs one, and stores what it measures in results/ (tools/gpu.sh)
# make clean       removes the environment and everything built
#
# WHAT="tests/models notebooks/04-*.ipynb" makes `make test` run these alone.
# CHAPTERS="4 8" makes `make planted` try these alone; what it has found is kept, so it may be stopped.
# PYTHON=python3.12 picks the interpreter (3.11 or newer).
# TORCH_BACKEND=cpu spares Linux machines without an NVIDIA card the CUDA libraries (any value of uv's --torch-backend).

# the first interpreter that is new enough; plain python3 if none is, so that the message below names it
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
            $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && exit; done; echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python \
      $(addprefix --find-links ,$(PIP_FIND_LINKS)) $(addprefix --torch-backend ,$(TORCH_BACKEND))
export OMP_NUM_THREADS ?= 1

.PHONY: book test pages notebooks figures check pdf links colab address elsewhere planted gpu clean

book: $(VENV)/.done
	$(BIN)/python tools/nb.py check
	$(BIN)/jupyter-book build . --all -W -n --keep-going

test: $(VENV)/.done
	$(BIN)/python -m pytest --nbval $(WHAT)

pages: book $(VENV)/.pages
	$(BIN)/python -m pytest tools/test_pages.py -n 3 --dist=worksteal
	$(BIN)/python -m pytest tools/test_live.py -n 0

notebooks: $(VENV)/.done
	$(BIN)/python tools/nb.py run

figures: $(VENV)/.done
	$(BIN)/python book/figures/draw.py

check: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell book t2t_ref tests tools *.md *.cff
	$(BIN)/python tools/nb.py check
	$(BIN)/python tools/rules.py
	$(BIN)/python tools/house.py

pdf: book
	$(UV) -r tools/requirements-pdf.txt
	$(BIN)/python tools/pdf.py

links: $(VENV)/.done
	$(BIN)/jupyter-book build . --builder linkcheck

elsewhere: $(VENV)/.done
	tools/elsewhere.sh $(NAMES)

planted: $(VENV)/.done
	$(BIN)/python tools/planted.py $(if $(CHAPTERS),--chapters $(CHAPTERS))

gpu:
	tools/gpu.sh

colab:
	PYTHON=$(PYTHON) tools/colab_like.sh

address: $(VENV)/.done
	$(BIN)/python tools/address.py "$(REPO)"

# one environment; made anew whenever the pins change, so that nothing of the old ones is left
$(VENV)/.done: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) $(NEW_ENOUGH) || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); the book needs Python 3.11 or newer:" \
	  "make PYTHON=/where/it/is $(MAKECMDGOALS)"; exit 1; }
	@test ! -L $(VENV) || { echo "$(VENV) is a link to another environment, which would be cleared: remove the link"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	$(UV) -r requirements.txt
	$(UV) --no-deps -e .
	touch $@

$(VENV)/.pages: tools/requirements-pages.txt $(VENV)/.done
	$(UV) -r tools/requirements-pages.txt
	touch $@

clean:
	rm -rf _build $(VENV)
