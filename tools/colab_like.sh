#!/usr/bin/env bash
# Runs the chapters as Colab would, and says what their set-up cells did: tools/colab_like.sh [NAME ...]
#
# Each notebook starts in a fresh environment with Colab's versions, without the package and without a copy of the
# repository. Its set-up cell installs the package, with pip and git, from the committed state of this checkout; the
# files that a chapter fetches from the repository come from there too. Only package registries are asked.
#
#   PYTHON=python3.13                       the interpreter (Colab's is 3.13)
#   TORCH=torch==2.11.0 TORCH_BACKEND=cpu   another torch than that of requirements.txt (Colab's is 2.11.0)
#   JOBS=1                                  chapters at a time (2)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export work base=$work/base OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYDEVD_DISABLE_FILE_VALIDATION=1
export IPYTHONDIR=$work/ipython MPLCONFIGDIR=$work/matplotlib GIT_CONFIG_GLOBAL=$work/gitconfig

# what Colab has before the set-up cell: all that the package needs but jaxtyping and kornia
torch=${TORCH:-$(grep -o '^torch==[^ ]*' "$root/requirements.txt")}
${PYTHON:-python3} -m venv "$base"
"$base/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" uv
# shellcheck disable=SC2086  # several folders are several words
"$base/bin/uv" pip install -q --compile-bytecode --python "$base/bin/python" -c "$root/tools/constraints-colab.txt" \
  ${PIP_FIND_LINKS:+$(printf -- '--find-links %s ' $PIP_FIND_LINKS)} ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} \
  "$torch" einops matplotlib numpy pillow safetensors accelerate datasets scikit-learn scipy tqdm \
  ipykernel pytest nbval jupytext pip setuptools wheel

# what GitHub would have: the committed state, on main, with an address
export repository=$work/repository
cat > "$GIT_CONFIG_GLOBAL" <<'EOF'
[safe]
  directory = *
[user]
  name = nobody
  email = nobody@localhost
[uploadpack]
  allowFilter = true
EOF
git init -q -b main "$repository"
git -C "$root" archive HEAD | tar -x -C "$repository"
cd "$repository"
git add -A -f
git commit -qm "The committed state"  # one commit: pip cannot clone from the shallow checkout of a CI
if grep -q 'url: .*YOUR_NAME_HERE' _config.yml; then
  "$base/bin/python" tools/address.py nobody/t2t-ref > "$work/address.log"
  git commit -qam "Set an address"
fi
"$base/bin/python" tools/nb.py check
address=$(sed -n 's|^  url: https://github.com/||p' _config.yml)
printf '[url "file://%s"]\n\tinsteadOf = https://github.com/%s\n' "$repository" "$address" >> "$GIT_CONFIG_GLOBAL"

# google.colab is there, and urllib finds the repository's files and nothing else
export site=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/google/colab"
cat > "$site/google/colab/__init__.py" <<EOF
from email.message import Message
from io import BytesIO
from pathlib import Path
from urllib import request
from urllib.response import addinfourl

RAW = "https://raw.githubusercontent.com/$address/main/"


class Repository(request.HTTPSHandler):
    def https_open(self, asked):
        path = Path("$repository", asked.full_url.removeprefix(RAW))
        known = asked.full_url.startswith(RAW) and path.is_file()
        content = path.read_bytes() if known else b""
        answer = addinfourl(BytesIO(content), Message(), asked.full_url, 200 if known else 404)
        answer.msg = "OK" if known else "Not served here"
        return answer


request.install_opener(request.build_opener(Repository))
EOF

cat > "$work/installed.py" <<'EOF'
import json
from importlib.metadata import distributions

print(json.dumps({found.name: found.version for found in reversed(list(distributions()))}))  # the first one counts
EOF

chapter() {  # one notebook in an environment and a folder of its own, as in a new session on Colab
  local folder=$work/content/$1 begin=$SECONDS
  local python=$folder/venv/bin/python
  mkdir -p "$folder"
  cp "$repository/notebooks/$1.ipynb" "$folder/"
  "$base/bin/python" -m venv --without-pip "$folder/venv"
  printf '%s\nimport google.colab\n' "$site" > \
    "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/colab.pth"
  cd "$folder"
  "$python" "$work/installed.py" > before.json
  "$python" -m pytest -q --rootdir . -p no:cacheprovider --nbval-lax --nbval-current-env --nbval-cell-timeout 600 -x \
    --junitxml cells.xml "$1.ipynb" > log.txt 2>&1 || tail -n 60 log.txt
  "$python" "$work/installed.py" > after.json
  echo $((SECONDS - begin)) > seconds
}
export -f chapter
mapfile -t names < <(printf '%s\n' "${@:-$(basename -s .ipynb "$repository"/notebooks/*.ipynb)}")
printf '%s\n' "${names[@]}" | xargs -P "${JOBS:-2}" -I{} bash -euo pipefail -c 'chapter {}'

# what came of it
"$base/bin/python" - "${names[@]}" <<'EOF'
import json
import os
import platform
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

faults, times = [], []
for name in sys.argv[1:]:
    folder = Path(os.environ["work"], "content", name)
    cells = list(xml.parse(folder / "cells.xml").iter("testcase"))
    failed = sum(cell.find("failure") is not None or cell.find("error") is not None for cell in cells)
    before, after = (json.loads((folder / f"{when}.json").read_text()) for when in ("before", "after"))
    replaced = [f"{p} {before[p]} by {after.get(p)}" for p in before if after.get(p) != before[p]]
    fetched = [path for path in folder.glob("results/**/*") if path.is_file()]
    seconds, set_up = int((folder / "seconds").read_text()), float(cells[0].get("time"))
    times.append(set_up)
    print(f"{name}: {len(cells)} cells in {seconds} s, set-up {set_up:.1f} s, {len(fetched)} files fetched, installed",
          *sorted(after.keys() - before.keys()), flush=True)
    if not cells or failed:
        faults.append(f"{name}: {failed} of {len(cells)} cells failed")
    if "t2t-ref" in before or "t2t-ref" not in after:
        faults.append(f"{name}: the package was there before the set-up cell, or not after it")
    if replaced:
        faults.append(f"{name}: the set-up cell replaced {', '.join(replaced)}")
    if "results_file(" in (folder / f"{name}.ipynb").read_text() and not fetched:
        faults.append(f"{name}: fetched no file of the repository")
print(f"Python {platform.python_version()}, the same before and after:",
      *(f"{package} {before[package]}," for package in ("torch", "numpy", "einops", "matplotlib")))
print(f"set-up took {min(times):.1f} to {max(times):.1f} s")
print(*faults, sep="\n", end="\n" if faults else "")
sys.exit(bool(faults))
EOF
