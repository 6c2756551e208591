"""The live page: its JavaScript against the package, run by node; its scripts and stored numbers.

The page itself is tested in a browser: make pages.
"""

import json
import shutil
import subprocess
from pathlib import Path

import live
import live_model
import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image

from t2t_ref import T2TViT, ViT, create_model, load_model, save_checkpoint
from t2t_ref.data.images import centre_crop
from t2t_ref.inspection import attention_maps, eval_without_gradients, tap, token_attention_maps

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "book" / "_static" / "live"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not on PATH, so the JavaScript cannot be run")
SMALL = dict(img_size=32, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, token_dim=16, num_classes=5)
KINDS = {
    "performer": (T2TViT, SMALL | dict(performer_drop_rate=0.0)),
    "epsilon": (T2TViT, SMALL | dict(performer_epsilon=0.3, qkv_bias=True)),
    "transformer": (T2TViT, SMALL | dict(tokens_type="transformer", qk_scale=0.4)),
    "convolution": (T2TViT, SMALL | dict(tokens_type="convolution")),
    "wide": (T2TViT, SMALL | dict(img_size=(32, 64))),
    "vit": (
        ViT,
        dict(img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=2, qkv_bias=True, num_classes=5),
    ),
}


def javascript(file: str, name: str, body: str, *arguments, source=None):
    """What a function body returns, given ``it`` (what the file defines under this name) and the arguments."""
    source = (STATIC / file).read_text(encoding="utf-8") if source is None else source
    program = f"{source}\nconst it = {name};\nconst out = ((...given) => {{ {body} }})(...{json.dumps(arguments)});\n"
    program += "console.log(JSON.stringify(out, (_, one) => ArrayBuffer.isView(one) ? [...one] : one));"
    done = subprocess.run([NODE, "-"], input=program, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


RUN = """
  if (given[3] && !it.withKernel()) throw new Error('no kernel');
  const bytes = new Uint8Array(require('fs').readFileSync(given[0])), model = it.readModel(bytes);
  const {probabilities, steps, blocks, grid} = it.run(model, Float32Array.from(given[1]), model.size, given[2]);
  const row = steps[1]?.attention?.row(3);
  return {probabilities, grid, steps, tokens: blocks.map(b => b.tokens), attention: blocks.map(b => b.attention), row};
"""


def of_page(path: Path, image: torch.Tensor, options: dict | None = None, source=None, kernel=False) -> dict:
    values = image.numpy().ravel().tolist()
    return javascript("model.js", "makeModel()", RUN, str(path), values, options or {}, kernel, source=source)


def at_random(model_class, **arguments):
    """A model all of whose weights are drawn at random; small ones where large keys would silence the performer."""
    torch.manual_seed(3)
    model = model_class(**arguments).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_((0.03 if "kqv" in name else 0.2) * torch.randn(weight.shape))
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A model whose weights are all drawn at random, its file, and an image."""
    model_class, arguments = KINDS[request.param]
    model = at_random(model_class, **arguments)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_checkpoint(model, path)
    return model, path, torch.randn(1, 3, *model.img_size)


def largest(found, expected: torch.Tensor) -> float:
    return (torch.tensor(found, dtype=torch.float64).ravel() - expected.double().ravel()).abs().max().item()


def against(model, image, found) -> float:
    """The largest difference from the package: probabilities, tokens of every block, attention."""
    names = [f"blocks.{number}" for number in range(len(model.blocks))]
    with eval_without_gradients(model), tap(model, names) as seen:
        probabilities = model(image).softmax(dim=-1)
    parts = [largest(found["probabilities"], probabilities)]
    parts += [largest(tokens, seen[name]) for tokens, name in zip(found["tokens"], names, strict=True)]
    parts += [
        largest(own, theirs) for own, theirs in zip(found["attention"], attention_maps(model, image), strict=True)
    ]
    if found.get("row"):
        parts.append(largest(found["row"], token_attention_maps(model, image)[0][0, 3]))
    return max(parts)


@needs_node
@pytest.mark.parametrize("kernel", [False, True], ids=["javascript", "kernel"])
def test_the_page_computes_what_the_package_computes(pair, kernel):
    model, path, image = pair
    found = of_page(path, image, kernel=kernel)
    assert tuple(found["grid"]) == model.grid
    assert against(model, image, found) < live.TOLERANCE


@needs_node
def test_the_switches_do_what_they_say(pair):
    model, path, image = pair
    order = list(range(1, len(model.pos_embed[0]) - 1)) + [0]
    shuffled = load_model(path).eval()
    with torch.no_grad():
        shuffled.pos_embed[0, 1:] = model.pos_embed[0, 1:][order]
    assert against(shuffled, image, of_page(path, image, dict(positions=order))) < live.TOLERANCE
    headless, width = load_model(path).eval(), model.embed_dim // model.blocks[0].attn.num_heads
    with torch.no_grad():
        headless.blocks[1].attn.proj.weight[:, width : 2 * width] = 0
    assert against(headless, image, of_page(path, image, dict(headOff=dict(block=1, head=1)))) < live.TOLERANCE
    if isinstance(model, T2TViT) and model.tokens_to_token.tokens_type != "convolution":
        quiet = load_model(path).eval()
        with torch.no_grad():
            for layer in (quiet.tokens_to_token.attention1, quiet.tokens_to_token.attention2):
                (layer.attn if hasattr(layer, "attn") else layer).proj.weight.zero_()
        found = of_page(path, image, dict(tokenAttention=False))
        assert against(quiet, image, found | dict(row=None)) < live.TOLERANCE


NORM = "weight('norm{0}.weight'), weight('norm{0}.bias'), epsilon"
PLACED = "x.set(model.weights.cls_token.data);\n  x.set(tokens, d);"
MISTAKES = {  # each keeps every shape
    "queries before keys": ("[keys, queries, values] = [0", "[queries, keys, values] = [0"),
    "no shortcut on the values": ("const tokens = add(values, linear(given", "const tokens = (linear(given"),
    "channel last in a token": ("maps[(c * h + above) * w + left]", "maps[(above * w + left) * channels + c]"),
    "rows and columns": ("maps[k * n + i] = tokens[i * d + k]", "maps[i * d + k] = tokens[i * d + k]"),
    "another epsilon of the norm": ("weight('norm1.bias'), 1e-5)", "weight('norm1.bias'), 1e-2)"),
    "another GELU": ("map(gelu)", "map(x => x / (1 + Math.exp(-1.702 * x)))"),
    "norm1 for norm2": (NORM.format(2), NORM.format(1)),
    "no last norm": ("const logits = linear(last.subarray", "const logits = linear(x.subarray"),
    "class token last": (PLACED, "x.set(tokens);\n  x.set(model.weights.cls_token.data, (n - 1) * d);"),
    "no scale": ("?? e ** -0.5", "?? 1"),
    "epsilon left out": ("kept[q] = epsilon > 0 ?", "kept[q] = epsilon > 1e9 ?"),
    "a token left out": ("totals[j] = softmax(overTokens, j, n, m)", "totals[j] = softmax(overTokens, j, n - 1, m)"),
}


@needs_node
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake, tmp_path):
    source = (STATIC / "model.js").read_text(encoding="utf-8")
    old, new = MISTAKES[mistake]
    assert old in source
    model = at_random(T2TViT, **SMALL | dict(img_size=(32, 64), performer_epsilon=0.3))
    save_checkpoint(model, tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 32, 64)
    found = of_page(tmp_path / "model.safetensors", image, source=source.replace(old, new))
    assert against(model, image, found) > 2 * live.TOLERANCE


@needs_node
@pytest.mark.parametrize("size", [(64, 64), (224, 320), (700, 700)])
def test_photographs_are_resized_as_pillow_does(size, tmp_path):
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB").crop((0, 0, 400, 333))
    (tmp_path / "pixels").write_bytes(np.array(image).tobytes())
    body = """const pixels = new Uint8ClampedArray(require('fs').readFileSync(given[0]));
      require('fs').writeFileSync(given[1], it.centreCrop({pixels, w: 400, h: 333}, ...given[2]).pixels); return 1;"""
    javascript("photo.js", "photo", body, str(tmp_path / "pixels"), str(tmp_path / "out"), size)
    found = np.frombuffer((tmp_path / "out").read_bytes(), np.uint8)
    np.testing.assert_array_equal(found, np.array(centre_crop(image, *size)).ravel())


@needs_node
def test_what_cannot_run_is_refused_by_name(tmp_path):
    save_checkpoint(create_model("t2t_vit_14_se", img_size=32), tmp_path / "se")
    save_checkpoint(T2TViT(**SMALL | dict(num_classes=0)), tmp_path / "headless")
    (tmp_path / "text").write_text("this is no model at all", encoding="utf-8")
    (tmp_path / "cut").write_bytes((tmp_path / "headless").read_bytes()[:-8])
    body = "try { it.readModel(new Uint8Array(require('fs').readFileSync(given[0]))); } catch (e) { return e.message; }"
    for name, words in {
        "se": "does not run here",
        "headless": "no head",
        "text": "save_checkpoint",
        "cut": "whole",
    }.items():
        assert words in javascript("model.js", "makeModel()", body, str(tmp_path / name)), name


def test_the_stored_numbers_are_those_of_the_package():
    assert live.differences(json.loads(live.FILE.read_text(encoding="utf-8")), live.content()) == []


def test_a_changed_number_is_seen():
    stored = json.loads(live.FILE.read_text(encoding="utf-8"))
    stored["expected"]["t2t"][3]["probabilities"][3] += 1e-3
    assert live.differences(stored, json.loads(live.FILE.read_text(encoding="utf-8"))) != []


def test_every_model_is_one_small_script():
    found = live_model.scripts(ROOT)
    assert found.keys() == {"t2t", "vit", "digits", "classes"}
    for name in live_model.MODELS:
        assert found[name].startswith(f"live.take('{name}', '") and len(found[name]) < 2**20


def test_the_page_says_how_well_its_models_read():
    stored = json.loads((ROOT / "results" / "what_it_sees.json").read_text(encoding="utf-8"))["arms"]
    for name in live_model.MODELS:
        found = [run["accuracy"] for run in stored[name]["runs"]]
        assert live_model.reads(name, ROOT).startswith(f"{np.mean(found):.0f} ± ")
        assert f"{found[0]:.0f} % this one" in live_model.reads(name, ROOT)  # the weights of the first seed
