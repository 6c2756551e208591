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


def picture(page) -> list[float]:
    return page.evaluate("[...live.state.rgb]")


def says(page, name: str) -> str:
    return page.inner_text(f"#live-{name}")


def test_digits_and_drawing(page):
    answered(page, lambda: page.click("#live-digits button:nth-child(4)"))
    first = share(page, 3)
    answered(page, lambda: page.click("#live-clear"))
    assert share(page, 3) != first
    assert says(page, "answer").startswith("Nothing is drawn.")
    box = page.locator("#live-pad").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    answered(page, lambda: page.mouse.move(box["x"] + 60, box["y"] + 200, steps=5))
    page.mouse.up()
    assert "reads a" in says(page, "answer")
    page.wait_for_function("document.querySelector('#live-said').textContent.includes('reads a')")


def test_an_empty_page_is_no_digit(page):
    for button in ("clear", "invert"):  # of whatever colour
        answered(page, lambda button=button: page.click(f"#live-{button}"))
        assert says(page, "answer").startswith("Nothing is drawn. T2T-ViT")
    answered(page, lambda: page.check("input[name=live-kind][value=vit]"))
    assert says(page, "answer").startswith("Nothing is drawn. ViT")
    answered(page, lambda: page.click("#live-digits button:nth-child(1)"))
    assert says(page, "answer").startswith("ViT reads a")


def test_answer_and_bars_show_one_state_in_a_long_stroke(page):
    page.evaluate("""() => {
      const bars = document.querySelector('#live-bars'), answer = document.querySelector('#live-answer');
      window.apart = 0;
      new MutationObserver(() => {
        const shares = [...bars.rows].map(row => parseFloat(row.cells[2].textContent)), most = Math.max(...shares);
        const [, digit, share] = answer.textContent.match(/reads a (\\d), (\\d+) %/);
        if (shares[digit] < most || Math.abs(share - most) > 0.6) window.apart++;
      }).observe(bars, {subtree: true, childList: true, characterData: true});
    }""")
    box, seen = page.locator("#live-pad").bounding_box(), set()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    answered(page, page.mouse.down)
    for step in range(1, 9):  # the button stays down
        answered(page, lambda step=step: page.mouse.move(box["x"] + 20 + 25 * step, box["y"] + 20 + 30 * (step % 3)))
        seen.add(says(page, "answer"))
    assert len(seen) > 1 and page.evaluate("window.apart") == 0
    page.mouse.up()


def test_a_shift_back_brings_the_drawing_back(page):
    answered(page, lambda: page.click("#live-digits button:nth-child(4)"))
    drawn, steps = picture(page), 12
    for button, back in (("right", "left"), ("up", "down")):  # the digit is cut off at the edge
        for _ in range(steps):
            page.click(f"#live-{button}")
        page.wait_for_function(f"document.querySelector('#live-shifted').textContent.includes('{steps} {button}')")
        if button == "right":  # what comes in is one colour for each channel
            before, now = ([one[i : i + 64] for i in range(0, len(one), 64)] for one in (drawn, picture(page)))
            assert all(new[steps:] == old[:-steps] for old, new in zip(before, now, strict=True))
            for channel in (now[:64], now[64:128], now[128:]):
                assert len({value for row in channel for value in row[:steps]}) == 1
        for _ in range(steps):
            page.click(f"#live-{back}")
        page.wait_for_function("document.querySelector('#live-shifted').textContent.startsWith('Back in its place.')")
        assert picture(page) == drawn


def test_what_a_shift_did_goes_with_the_drawing(page):
    def shifted():
        answered(page, lambda: page.click("#live-right"))
        assert "Shifted: 1 right. T2T-ViT: its 16 tokens moved by" in says(page, "shifted")

    shifted()
    answered(page, lambda: page.check("input[name=live-kind][value=vit]"))
    assert "tokens moved by" in says(page, "shifted")  # of both models
    answered(page, lambda: page.click("#live-digits button:nth-child(4)"))
    assert says(page, "shifted") == ""
    shifted()
    answered(page, lambda: page.locator("#live-pad").click(position={"x": 20, "y": 20}))
    assert says(page, "shifted") == "Shifted: 1 right."
    drawn = picture(page)
    answered(page, lambda: page.click("#live-right"))
    answered(page, lambda: page.click("#live-left"))
    assert picture(page) == drawn  # the new dot too


def test_keys_draw_lines_and_show_the_pen(page):
    pad = "document.querySelector('#live-pad')"
    orange = f"""[...{pad}.getContext('2d').getImageData(0, 0, 64, 64).data].filter((value, i, all) =>
      i % 4 === 0 && value === 213 && all[i + 1] === 94 && all[i + 2] === 0).length"""
    skip = page.locator("#live-skip a")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert skip.evaluate("one => one === document.activeElement") and skip.inner_text() == "Skip to the drawing"
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.activeElement === {pad}")
    answered(page, lambda: page.click("#live-clear"))
    assert page.evaluate(orange) == 0
    page.focus("#live-pad")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(orange) > 10
    before = len(set(picture(page)))
    page.keyboard.press("Shift+ArrowLeft")
    assert before == len(set(picture(page))) == 1  # the pen moves, and draws nothing
    answered(page, lambda: page.keyboard.down(" "))
    answered(page, lambda: page.keyboard.press("Shift+ArrowRight"))
    answered(page, lambda: page.keyboard.press("Shift+ArrowRight"))
    page.keyboard.up(" ")
    row = [round(value, 3) for value in picture(page)[31 * 64 : 32 * 64]]  # of the pen: from column 24 to 40
    assert row[24:41] == [0.85] * 17 and row[:20] == [0.2] * 20 and row[45:] == [0.2] * 19
    drawn = picture(page)
    page.keyboard.press("Shift+ArrowDown")
    assert picture(page) == drawn
    page.focus("#live-clear")
    assert page.evaluate(orange) == 0


def test_each_model_is_told_as_it_is(page):
    assert "Fewer tokens come from the stride" in says(page, "splits") and "7 x 7 x 3 = 147" in says(page, "splits")
    assert says(page, "remain") == "4 x 4 tokens are all that three soft splits leave of 64 x 64 pixels."
    step = page.input_value("#live-step")
    assert step == "T2T layer 1"
    answered(page, lambda: page.check("input[name=live-kind][value=vit]"))
    assert says(page, "splits").startswith("One hard split") and "stride" not in says(page, "splits")
    assert says(page, "remain") == "4 x 4 tokens are all that one hard split leaves of 64 x 64 pixels."
    assert page.input_value("#live-step") == "tokens"
    answered(page, lambda: page.check("input[name=live-kind][value=t2t]"))
    assert page.input_value("#live-step") == step
    page.select_option("#live-step", "soft split 2")
    answered(page, lambda: page.check("input[name=live-kind][value=vit]"))
    answered(page, lambda: page.check("input[name=live-kind][value=t2t]"))
    assert page.input_value("#live-step") == "soft split 2"


def test_attention_that_is_off_is_not_drawn(page):
    assert page.is_visible("#live-layer1") and not page.is_visible("#live-unheard")
    answered(page, lambda: page.check("#live-values"))
    assert not page.is_visible("#live-heard") and says(page, "unheard").startswith("Attention is off")
    answered(page, lambda: page.uncheck("#live-values"))
    assert page.is_visible("#live-layer1") and "tokens are silent, token (8, 8) " in says(page, "silent1")
    inside = """() => {
      const canvas = document.querySelector('#live-attention'), {width, height} = canvas;
      return [...canvas.getContext('2d').getImageData(width - 20, height - 20, 10, 10).data].some(value => value > 0);
    }"""
    assert page.evaluate(inside) and page.is_visible("#live-over")
    block, head = map(int, page.input_value("#live-looked").split(","))  # at first, the last of the last block
    answered(page, lambda: page.select_option("#live-head", f"{block},{head}"))
    assert f"Block {block + 1}, head {head + 1} is switched off" in says(page, "attention-facts")
    assert not page.evaluate(inside) and not page.is_visible("#live-over")
    page.locator("#live-attention").click(position={"x": 10, "y": 10})
    assert "Block 1, head 1: " in says(page, "attention-facts") and page.input_value("#live-looked") == "0,0"


def test_the_answer_stays_in_sight(page):
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        for name in ("bars", "head", "stages", "positions"):
            page.locator(f"#live-{name}").evaluate("one => one.scrollIntoView({block: 'center', behavior: 'instant'})")
            answer, below = (page.locator(f"#live-{one}").bounding_box() for one in ("answer", name))
            assert 50 < answer["y"] < below["y"] - answer["height"], (size, name)  # below the bar of the theme


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


def test_a_model_of_the_reader(page, tmp_path):
    (tmp_path / "vit.safetensors").write_bytes(in_half_precision(ROOT / "results" / "weights" / "vit.safetensors"))
    page.click("#live summary")
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
