# make book        builds the book into _build/html (sets up .venv the first time)
# make test        runs every chapter as a test, and the package's own tests
# make pages       builds the book and tests every page in a browser: links, search, keyboard, light, dark, phone
# make notebooks   after editing book/NN-*.md: writes the notebooks, runs those whose code changed
# make figures     redraws the diagrams in book/figures
# make check       lint, spelling, pairing of text and notebooks, einops only, mirrored definitions
# make pdf         prints the book into _build/html/t2t-vit.pdf (needs a Chromium or Chrome; takes minutes)
# make links       asks every page on the web that the book links to
# make colab       runs every chapter as Colab would: its versions, and the package from git (tools/colab_like.sh)
# make address     REPO=owner/name: writes the repository's address wherever it stands
# make clean       removes the environment and everything built
#
# PYTHON=python3.12 picks the interpreter (3.11 or newer).
# TORCH_BACKEND=cpu spares Linux machines without an NVIDIA card the CUDA libraries (any value of uv's --torch-backend).

# the first interpreter that is new enough; plain python3 if none is, so that the message below names it
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
            $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && exit; done; echo python3)
BIN := .venv/bin
UV := $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python \
      $(addprefix --find-links ,$(PIP_FIND_LINKS)) $(addprefix --torch-backend ,$(TORCH_BACKEND))
export OMP_NUM_THREADS ?= 1

.PHONY: book test pages notebooks figures check pdf links address clean

book: .venv/.done
	$(BIN)/python tools/nb.py check
	$(BIN)/jupyter-book build . --all -W -n --keep-going

test: .venv/.done
	$(BIN)/python -m pytest --nbval

pages: book .venv/.pages
	$(BIN)/python -m pytest tools/test_pages.py -n 3 --dist=worksteal

notebooks: .venv/.done
	$(BIN)/python tools/nb.py run

figures: .venv/.done
	$(BIN)/python book/figures/draw.py

check: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell book t2t_ref tests tools *.md *.cff
	$(BIN)/python tools/nb.py check
	$(BIN)/python tools/rules.py

pdf: book
	$(UV) -r tools/requirements-pdf.txt
	$(BIN)/python tools/pdf.py

links: .venv/.done
	$(BIN)/jupyter-book build . --builder linkcheck

colab:
	PYTHON=$(PYTHON) tools/colab_like.sh

address: .venv/.done
	$(BIN)/python tools/address.py "$(REPO)"

# one environment; made anew whenever the pins change, so that nothing of the old ones is left
.venv/.done: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) $(NEW_ENOUGH) || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); the book needs Python 3.11 or newer:" \
	  "make PYTHON=/where/it/is $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	$(UV) -r requirements.txt
	$(UV) --no-deps -e .
	touch $@

.venv/.pages: tools/requirements-pages.txt .venv/.done
	$(UV) -r tools/requirements-pages.txt
	touch $@

clean:
	rm -rf _build .venv
