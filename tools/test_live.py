"""The live page in a browser, against the numbers that PyTorch gave (book/live_digits.json): make pages"""

import base64
import json
import re

import live
import pytest
import torch
import wasmtime
from live_model import in_half_precision
from test_pages import BOOK, PHONE, ROOT, WIDE, base, contexts  # noqa: F401  (fixtures)

from t2t_ref import T2TViT, save_checkpoint

EXPECTED = json.loads(live.FILE.read_text(encoding="utf-8"))
NUMBERS = """async ([kind, digit]) => {
  await live.need(kind);
  await live.need('digits');
  const {pixels} = live.state.digits[digit], area = 64 * 64;
  const rgb = Float32Array.from({length: 3 * area}, (_, i) => pixels[3 * (i % area) + Math.floor(i / area)] / 255);
  const {probabilities, steps, blocks} = live.answer(kind, rgb);
  return {probabilities: [...probabilities], steps: steps.map(step => [step.name, [...step.tokens]]),
    attention: blocks.map(({attention}) => attention.flatMap(weights => [...weights.subarray(0, 17)]))};
}"""


@pytest.fixture(params=["light", "dark"])
def page(request, contexts, base):  # noqa: F811
    page = contexts[request.param].new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(base + "book/live.html")
    page.wait_for_selector("#live-root[data-answered]")
    yield page
    page.close()
    assert [fault for fault in page.faults if "THEBE_JS_URL" not in fault] == []


def answered(page, action) -> int:
    """Does something, and waits until the page has answered it."""
    before = int(page.get_attribute("#live-root", "data-answered"))
    action()
    page.wait_for_function("n => Number(document.querySelector('#live-root').dataset.answered) > n", arg=before)


def share(page, digit: int) -> str:
    return page.inner_text(f"#live-bars tr:nth-child({digit + 1}) td:last-child")


@pytest.mark.parametrize("kind", ["t2t", "vit"])
def test_the_page_gives_the_numbers_of_pytorch(page, kind):
    for digit, expected in enumerate(EXPECTED["expected"][kind]):
        found = page.evaluate(NUMBERS, [kind, digit])
        steps = {name: live.fingerprint(torch.tensor(tokens)) for name, tokens in found["steps"]}
        found["steps"] = {name: steps[name] for name in expected["steps"]}
        assert live.differences(expected, found) == []


def test_the_kernel_is_its_source():
    folder = ROOT / "book" / "_static" / "live"
    text = (folder / "model.js").read_text(encoding="utf-8").split("const KERNEL = ")[1].split(";")[0]
    stored = base64.b64decode("".join(re.findall("'([^']*)'", text)))
    assert wasmtime.wat2wasm((folder / "kernel.wat").read_text(encoding="utf-8")) == stored


def test_digits_drawing_and_keys(page):
    answered(page, lambda: page.click("#live-digits button:nth-child(4)"))
    first = share(page, 3)
    answered(page, lambda: page.click("#live-clear"))
    assert share(page, 3) != first
    box = page.locator("#live-pad").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    answered(page, lambda: page.mouse.move(box["x"] + 60, box["y"] + 200, steps=5))
    page.mouse.up()
    page.focus("#live-pad")
    page.keyboard.press("ArrowRight")
    answered(page, lambda: page.keyboard.press(" "))
    page.wait_for_function("document.querySelector('#live-answer').textContent.includes('reads a')")


def test_windows_of_a_pixel(page):
    page.focus("#live-seen")
    assert "Pixel (32, 32) lies in 4 of 256 windows" in page.inner_text("#live-windows")  # 26 to 32 and 30 to 36
    page.keyboard.press("ArrowRight")
    assert "Pixel (32, 33) lies in 2 of 256 windows" in page.inner_text("#live-windows")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert "Pixel (31, 25) lies in 2 of 256 windows" in page.inner_text("#live-windows")
    answered(page, lambda: page.check("input[name=live-kind][value=vit]"))
    assert "1 of 16 windows" in page.inner_text("#live-windows")


def test_switches_change_the_answer_and_back(page):
    answered(page, lambda: page.click("#live-digits button:nth-child(6)"))
    numbers = "[...live.state.result.probabilities]"
    first = page.evaluate(numbers)
    answered(page, lambda: page.check("#live-shuffle"))
    assert page.evaluate(numbers) != first
    answered(page, lambda: page.uncheck("#live-shuffle"))
    answered(page, lambda: page.select_option("#live-head", "3,0"))
    assert page.evaluate(numbers) != first
    answered(page, lambda: page.select_option("#live-head", ""))
    assert page.evaluate(numbers) == first
    answered(page, lambda: page.click("#live-right"))
    assert "T2T-ViT: its 16 tokens moved by" in page.inner_text("#live-shifted")


def test_a_model_of_the_reader(page, tmp_path):
    (tmp_path / "vit.safetensors").write_bytes(in_half_precision(ROOT / "results" / "weights" / "vit.safetensors"))
    page.set_input_files("#live-own-file", tmp_path / "vit.safetensors")
    page.set_input_files("#live-own-picture", ROOT / "book" / "figures" / "live.png")
    page.wait_for_function("document.querySelector('#live-own-answer').textContent.includes('ms')")
    assert "class " in page.inner_text("#live-own-answer")
    save_checkpoint(
        T2TViT(img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=0), tmp_path / "headless.safetensors"
    )
    page.set_input_files("#live-own-file", tmp_path / "headless.safetensors")
    page.wait_for_function("document.querySelector('#live-own-answer').textContent.includes('no head')")


def test_it_runs_from_a_file_and_on_a_phone(contexts):  # noqa: F811
    page = contexts["light"].new_page()
    page.set_viewport_size(PHONE)
    page.goto((BOOK / "book" / "live.html").as_uri())
    page.wait_for_selector("#live-root[data-answered]")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.close()


def test_a_mistake_in_the_script_is_seen(contexts, base):  # noqa: F811
    page = contexts["light"].new_page()

    def spoil(route):
        source = (BOOK / "_static" / "live" / "model.js").read_text(encoding="utf-8")
        assert "[keys, queries, values] = [0" in source
        route.fulfill(
            body=source.replace("[keys, queries, values] = [0", "[queries, keys, values] = [0"),
            content_type="text/javascript",
        )

    page.route("**/live/model.js*", spoil)
    page.goto(base + "book/live.html")
    page.wait_for_selector("#live-root[data-answered]")
    found = page.evaluate(NUMBERS, ["t2t", 0])
    page.close()
    assert live.differences(EXPECTED["expected"]["t2t"][0]["probabilities"], found["probabilities"]) != []


def test_without_scripts_there_is_a_picture(contexts, base):  # noqa: F811
    browser = contexts["light"].browser
    plain = browser.new_context(java_script_enabled=False, viewport=WIDE)
    page = plain.new_page()
    page.goto(base + "book/live.html")
    assert page.is_visible(".live-picture img") and not page.is_visible("#live-root")
    plain.close()
