#!/usr/bin/env bash
# Builds wheel and sdist into _build/dist and tries the wheel in a clean environment: tools/dist.sh [v1.2.3]
# With a tag, that tag has to be the package's version. PYTHON and TORCH_BACKEND as in the Makefile; TORCH=torch==2.13.0
# takes that torch and not the newest.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

version=$(sed -n 's/^__version__ = "\([^"]*\)".*/\1/p' t2t_ref/weights/_version.py)
if [ "${1:-v$version}" != "v$version" ]; then
  echo "the tag is $1, but t2t_ref.__version__ is $version" >&2
  exit 1
fi

# from the committed state, so that nothing that lies about here gets in
git archive --prefix=source/ HEAD | tar -x -C "$work"
"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q --disable-pip-version-check -r tools/requirements-dist.txt
rm -rf _build/dist
"$work/tools/bin/python" -m build --outdir _build/dist "$work/source" > "$work/log" || { cat "$work/log"; exit 1; }
"$work/tools/bin/twine" check --strict _build/dist/*
wheel=$(echo _build/dist/*.whl)

# the wheel holds the files of the package and its licence, and nothing else
"$work/tools/bin/python" -m zipfile -l "$wheel" | awk 'NR > 1 {print $1}' | grep -v '\.dist-info/' | sort > "$work/found"
git ls-tree -r --name-only HEAD t2t_ref | sort | diff - "$work/found"
"$work/tools/bin/python" -m zipfile -l "$wheel" | grep -q '\.dist-info/licenses/LICENSE'

# as a user has it: no checkout in sight
"${PYTHON:-python3}" -m venv "$work/clean"
"$work/tools/bin/uv" pip install -q --python "$work/clean/bin/python" \
  ${PIP_FIND_LINKS:+$(printf -- '--find-links %s ' $PIP_FIND_LINKS)} ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} "$wheel" ${TORCH:-}
cd "$work"
"$work/clean/bin/python" - "$version" <<'EOF'
import sys

import torch

import t2t_ref

assert t2t_ref.__version__ == sys.argv[1], t2t_ref.__version__
assert "site-packages" in t2t_ref.__file__, t2t_ref.__file__
model = t2t_ref.create_model("t2t_vit_7", img_size=64, num_classes=10).eval()
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
assert len(t2t_ref.imagenet_class_names()) == 1000  # from a file that comes with the package
assert all(hasattr(t2t_ref, name) for name in t2t_ref.__all__)
t2t_ref.save_checkpoint(model, "mine.safetensors")
assert torch.equal(t2t_ref.load_model("mine.safetensors").head.weight, model.head.weight)
torch.save({"state_dict": model.state_dict(), "best": 81.5}, "mine.pth")
assert not t2t_ref.load_checkpoint(model, "mine.pth").skipped
from PIL import Image

Image.new("RGB", (300, 200)).save("photo.png")
assert t2t_ref.preprocess("photo.png").shape == (1, 3, 224, 224)
print("works:", t2t_ref.__file__.removeprefix(sys.prefix), "with torch", torch.__version__)
EOF
ls -l "$root/_build/dist"
