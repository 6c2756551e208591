"""Writes book/live_digits.json: ten digits for the live page, and what PyTorch makes of them.

    python tools/live.py            writes it
    python tools/live.py --check    says what has changed
    python tools/live.py --picture  draws book/figures/live.png from the built page (needs what make pages installs)

The digits are the first of each in the test set, right or wrong. The models have the weights of results/weights, in
half precision as the page gets them; sums are taken in float32.
"""

import argparse
import base64
import json
import math
import os
import sys
from pathlib import Path

import torch
from einops import rearrange

from t2t_ref import load_model
from t2t_ref.data.digits import ScatteredDigits
from t2t_ref.experiments import DATA, normalise
from t2t_ref.inspection import attention_maps, eval_without_gradients, tap

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "book" / "live_digits.json"
TOLERANCE = 5e-5
STEPS = {  # of the page: where it is in the model
    "t2t": {
        "soft split 1": "tokens_to_token.soft_split0", "T2T layer 1": "tokens_to_token.attention1",
        "soft split 2": "tokens_to_token.soft_split1", "T2T layer 2": "tokens_to_token.attention2",
        "soft split 3": "tokens_to_token.soft_split2", "tokens": "tokens_to_token.project",
    },
    "vit": {"tokens": "patch_embed"},
}  # fmt: skip


def first_of_each() -> tuple[torch.Tensor, list[int]]:
    """Ten test digits as bytes of c h w, in the order of their labels."""
    options = {name: value for name, value in DATA.items() if name != "size"}
    images, labels = ScatteredDigits("test", seed=0, size=DATA["size"], **options).draw(range(200))
    numbers = [labels.tolist().index(label) for label in range(10)]
    return (images[numbers] * 255).round().byte(), numbers


def model_of_the_page(name: str) -> torch.nn.Module:
    """A stored model with its weights rounded to half precision."""
    model = load_model(ROOT / "results" / "weights" / f"{name}.safetensors").eval()
    with torch.no_grad():
        for weight in model.state_dict().values():
            weight.copy_(weight.half().float())
    return model


def fingerprint(values: torch.Tensor) -> list[float]:
    """Three numbers that change when any two of the values change places."""
    flat = rearrange(values.double(), "... -> (...)")
    places = torch.arange(len(flat), dtype=torch.double)
    return [(flat * torch.cos(places * k)).mean().item() for k in (0.0, 0.7, 1.9)]


def expected(name: str, images: torch.Tensor) -> list[dict]:
    """For each digit: probabilities, a fingerprint of each step's tokens, the class token's attention."""
    model, found = model_of_the_page(name), []
    for image in normalise(images).split(1):
        with eval_without_gradients(model), tap(model, list(STEPS[name].values())) as seen:
            probabilities = model(image).softmax(dim=-1)[0]
        maps = attention_maps(model, image)
        found.append(
            dict(
                probabilities=probabilities.tolist(),
                steps={step: fingerprint(seen[place][0]) for step, place in STEPS[name].items()},
                attention=[rearrange(block[0, :, 0], "g k -> (g k)").tolist() for block in maps],
            )
        )
    return found


def content() -> dict:
    images, numbers = first_of_each()
    pixels = [base64.b64encode(rearrange(image, "c h w -> h w c").numpy().tobytes()).decode() for image in images]
    digits = [dict(label=label, number=numbers[label], pixels=pixels[label]) for label in range(10)]
    return dict(
        command="python tools/live.py", data="test digits of t2t_ref.data.ScatteredDigits, 64 x 64 pixels, h w c",
        digits=digits, expected={name: expected(name, images) for name in STEPS},
    )  # fmt: skip


def differences(stored, fresh, where: str = "") -> list[str]:
    """Places at which two contents differ by more than the tolerance."""
    if isinstance(stored, dict) and isinstance(fresh, dict) and stored.keys() == fresh.keys():
        return [line for key in stored for line in differences(stored[key], fresh[key], f"{where}.{key}")]
    if isinstance(stored, list) and isinstance(fresh, list) and len(stored) == len(fresh):
        pairs = zip(stored, fresh, strict=True)
        return [line for i, pair in enumerate(pairs) for line in differences(*pair, f"{where}[{i}]")]
    if isinstance(stored, float) and isinstance(fresh, float):
        return [] if math.isclose(stored, fresh, abs_tol=TOLERANCE) else [f"{where}: {stored} is stored, {fresh} found"]
    return [] if stored == fresh else [f"{where} differs"]


def take_picture(site: Path) -> None:
    """A picture of the page, for readers without scripts and for paper."""
    import subprocess

    from playwright.sync_api import sync_playwright

    found = subprocess.run(["sh", ROOT / "tools" / "browser.sh"], capture_output=True, text=True, check=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found.stdout.strip(), args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto((site / "book" / "live.html").as_uri())
        page.wait_for_selector("#live-root[data-answered]")
        page.click("#live-digits button:nth-child(4)")
        page.wait_for_timeout(1500)
        page.evaluate("document.querySelector('#live-time').hidden = true")  # it is another one each time
        page.locator("#live .live-cards").first.screenshot(path=ROOT / "book" / "figures" / "live.png")
        browser.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is out of step")
    parser.add_argument("--picture", action="store_true", help="take the picture of the built page instead")
    options = parser.parse_args(arguments)
    if options.picture:
        take_picture(Path(os.environ.get("BOOK", ROOT / "_build" / "html")).resolve())
        return 0
    if options.check:
        found = differences(json.loads(FILE.read_text(encoding="utf-8")), content())
        print("\n".join(found[:20]) or "book/live_digits.json is what PyTorch gives")
        return 1 if found else 0
    FILE.write_text(json.dumps(content(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
