"""The built book, page by page, as files and in a browser: make pages

The first half reads the files: links, alt texts, weights, addresses. The second half opens every page in Chromium,
light and dark, wide and as narrow as a phone. The last part spoils a small site and sees each check fail. New pages are
found by themselves. BOOK=folder tests another build, CHROMIUM=path takes another browser.
"""

import functools
import http.server
import os
import re
import subprocess
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import address
import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]

BOOK = Path(os.environ.get("BOOK", ROOT / "_build" / "html")).resolve()
PDF = "t2t-vit.pdf"  # lies beside the pages once make pdf has run
LARGEST = 2_000_000  # bytes of a page with its images
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def pages(site: Path) -> list[str]:
    """Every page; the folder's own index.html does nothing but send the reader to the landing page."""
    found = (path.relative_to(site) for path in sorted(site.rglob("*.html")))
    return [path.as_posix() for path in found if path.parts[0] != "_static" and path.as_posix() != "index.html"]


PAGES = pages(BOOK)
CHAPTERS = [name for name in PAGES if name.startswith("notebooks/")]


# ---- as files


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(path: Path) -> frozenset[str]:
    return frozenset(tag.get(key) for key in ("id", "name") for tag in soup(path).find_all(attrs={key: True}))


def addresses(page: Path) -> list[str]:
    """All that a page points to: links, images, scripts, style sheets, and where it sends the reader on."""
    found = [
        tag[key] for key in ("href", "src", "poster", "xlink:href") for tag in soup(page).find_all(attrs={key: True})
    ]
    refresh = soup(page).find_all("meta", attrs={"http-equiv": re.compile("^refresh$", re.I)})
    return found + [tag["content"].split("url=", 1)[1] for tag in refresh]


def dead_links(site: Path, name: str) -> list[str]:
    """Links inside the site whose file or whose anchor does not exist."""
    page, dead = site / name, []
    for link in dict.fromkeys(addresses(page)):
        parts = urlsplit(link)
        if parts.scheme in ("http", "https", "mailto", "data") or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        anchor = unquote(parts.fragment)
        if parts.scheme or not target.is_relative_to(site) or not target.is_file():
            dead.append(f"no such file: {link}")
        elif anchor and target.suffix == ".html" and anchor not in anchors(target):
            dead.append(f"no such anchor: {link}")
    return dead


def odd_addresses(site: Path, name: str, repository: str, root: Path) -> list[str]:
    """Links to other hosts that cannot be right: ill-formed, or to a file that the repository or the site lacks."""
    odd, owner = [], repository.split("/")[0]
    for link in dict.fromkeys(addresses(site / name)):
        parts = urlsplit(link)
        if parts.scheme not in ("http", "https"):
            continue
        host, path = parts.netloc, unquote(parts.path)
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.[a-z]{2,}", host, re.I if owner in host else 0) or re.search(
            r"\s", link
        ):
            odd.append(link)
        elif host.lower() == f"{owner}.github.io".lower():
            inside = path.removeprefix(f"/{repository.split('/')[1]}/")
            file = site / inside / ("" if Path(inside).suffix else "index.html")
            if inside == path or not (file.is_file() or inside == PDF):
                odd.append(link)
        elif owner in link:
            known = re.fullmatch(rf"(?:/github)?/{re.escape(repository)}(?:\.git|/(\w+)(?:/main/(.+)|/.*)?)?/?", path)
            kind, file = known.groups() if known else (None, None)
            if host not in ("github.com", "colab.research.google.com", "raw.githubusercontent.com") or not known:
                odd.append(link)
            elif kind in ("blob", "tree", "raw", "edit") and not (file and (root / file).exists()):
                odd.append(link)
    return odd


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def unsaid_figures(page: Path) -> list[str]:
    """Pictures of the text whose alternative says nothing: missing, too short, a file name, the caption once more."""
    body, faults, seen = soup(page).find("article") or soup(page).find("main"), [], {}
    for picture in body.find_all(["img", "svg"]):
        if picture.get("aria-hidden") == "true" or picture.find_parent("svg") or "toggler" in picture.get("class", []):
            continue  # the last: a minus that folds the entries of Sphinx's index of modules
        title = picture.find("title")
        said = picture.get("alt") or picture.get("aria-label") or (title.get_text() if title else "")
        figure = picture.find_parent("figure")
        caption = figure.find("figcaption") if figure else None
        what = f"{Path(picture.get('src', 'svg')).name}: {said!r}"
        if picture.name == "svg" and picture.get("role") != "img":
            faults.append(f"no role=img: {what}")
        elif len(words(said)) < 6 or re.search(r"\.(png|svg|jpe?g|gif)\b", said):
            faults.append(f"does not say what it shows: {what}")
        elif caption and " ".join(words(said)) in " ".join(words(caption.get_text())):
            faults.append(f"says what the caption says: {what}")
        elif seen.setdefault(said, picture.get("src")) != picture.get("src"):
            faults.append(f"says what another figure says: {what}")
    return faults


def weight(page: Path) -> int:
    """Bytes of a page (what is written into it included) and of its images."""
    images = {tag["src"] for tag in soup(page).find_all("img", src=True) if not urlsplit(tag["src"]).scheme}
    files = [page] + [page.parent / unquote(urlsplit(one).path) for one in images]
    return sum(path.stat().st_size for path in files if path.is_file())


def test_the_book_is_there():
    assert len(CHAPTERS) == len(list((ROOT / "notebooks").glob("*.ipynb"))) > 0
    assert dead_links(BOOK, "index.html") == [] and addresses(BOOK / "index.html") == ["book/index.html"]


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors_resolve(name):
    assert dead_links(BOOK, name) == []


@pytest.mark.parametrize("name", PAGES)
def test_addresses_of_the_repository_are_right(name):
    assert odd_addresses(BOOK, name, address.current(ROOT), ROOT) == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_button_opens_the_chapter_on_colab(name):
    buttons = {link for link in addresses(BOOK / name) if "colab.research" in link}
    notebook = Path(name).with_suffix(".ipynb")
    assert (ROOT / notebook).is_file()
    where = f"https://colab.research.google.com/github/{address.current(ROOT)}/blob/main/{notebook.as_posix()}"
    assert buttons == {where}


@pytest.mark.parametrize("name", PAGES)
def test_figures_say_what_they_show(name):
    assert unsaid_figures(BOOK / name) == []


@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_heavy(name):
    assert weight(BOOK / name) <= LARGEST


@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_the_icon(name):  # without it a browser asks the host for /favicon.ico
    assert len(soup(BOOK / name).find_all("link", rel="icon", href=True)) == 1


# ---- in a browser

FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
FLAGS += ["--disable-quic", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
TWICE = "Identifier 'THEBE_JS_URL' has already been declared"  # sphinx-thebe 0.3.1 writes its line twice; harmless
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
RULES |= {"preload": False}
NOT_OURS = {  # rule -> the mark-up that breaks it and is not ours
    # docutils writes a list of citations as a list without list items, each with a role that ARIA 1.3 gave up
    "aria-required-children": "div.citation-list[role=list]",
    "aria-deprecated-role": "div.citation[role=doc-biblioentry]",
}
# axe looks at the colours of each word of code, thousands on a page: leave out blocks that bring no new colours
MARK_REPEATS = """() => {
  const seen = new Set();
  for (const block of document.querySelectorAll('pre')) {
    const behind = [block, block.parentElement].map(one => getComputedStyle(one).backgroundColor);
    const colours = [block, ...block.querySelectorAll('span')].map(one => getComputedStyle(one))
      .map(style => [style.color, style.backgroundColor, style.fontWeight, ...behind].join());
    block.toggleAttribute('data-repeat', colours.every(one => seen.has(one)));
    colours.forEach(one => seen.add(one));
  }
}"""
AXE = """async ([rules, except]) => {
  const found = await axe.run({exclude: ['pre[data-repeat]']}, rules);
  return found.violations.flatMap(({id, impact, nodes}) => nodes
    .filter(node => !(except[id] && document.querySelector(node.target.at(-1)).matches(except[id])))
    .map(node => `axe ${id} (${impact}): ${node.html.slice(0, 150)}`));
}"""
# what sticks out of the window, unless it scrolls in a box of its own
TOO_WIDE = """() => {
  const wide = [...document.querySelectorAll('body *')].filter(one => {
    const box = one.getBoundingClientRect();
    if (box.width * box.height === 0 || box.right <= innerWidth + 1) return false;
    for (let up = one; up && up !== document.body; up = up.parentElement) {
      const style = getComputedStyle(up);
      if ((up !== one && style.overflowX !== 'visible') || style.position === 'fixed') return false;
    }
    return true;
  });
  const first = wide.filter(one => !wide.includes(one.parentElement));
  const page = document.documentElement.scrollWidth;
  return [...(page > innerWidth ? [`wider than a phone: ${page} pixels`] : []),
    ...first.map(one => `sticks out of a phone: ${one.outerHTML.slice(0, 150)}`)];
}"""
FORMULAS = """async () => {
  if (window.MathJax) await MathJax.startup.promise;
  const faults = [...document.querySelectorAll('mjx-merror')].map(one => `MathJax error: ${one.textContent}`);
  for (const one of document.querySelectorAll('.math, .text_latex'))
    if (!one.querySelector('mjx-container')) faults.push(`not rendered: ${one.textContent.slice(0, 80)}`);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const {data, parentElement} = texts.currentNode, kept = 'pre, code, script, style, iframe';
    if (!parentElement.closest(kept) && /\\$\\$|\\\\[([]|\\\\(begin|tag|frac)\\b|^:::|```/.test(data))
      faults.push(`raw mark-up: ${data.trim().slice(0, 80)}`);
  }
  return faults;
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *args):  # a page was closed while it loaded
        pass


@contextmanager
def served(site: Path):
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def base():
    with served(BOOK) as url:
        yield url


@pytest.fixture(scope="session")
def contexts():
    """A browser with a light and a dark window; the reader has chosen the theme with the button of the page."""
    found = subprocess.run(["sh", ROOT / "tools" / "browser.sh"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found.stdout.strip(), args=FLAGS)
        both = {}
        for scheme in ("light", "dark"):
            both[scheme] = browser.new_context(color_scheme=scheme, viewport=WIDE)
            both[scheme].set_default_timeout(60_000)
            choice = "".join(f"localStorage.setItem('{key}', '{scheme}');" for key in ("mode", "theme"))
            both[scheme].add_init_script(f"if (location.protocol === 'http:') {{ {choice} }}")
        yield both
        browser.close()


@pytest.fixture
def light(contexts):
    page = contexts["light"].new_page()
    yield page
    page.close()


def accessibility(frame) -> list[str]:
    frame.evaluate(MARK_REPEATS)
    if not frame.evaluate("'axe' in window"):
        frame.evaluate(Axe().axe_script)
    return frame.evaluate(AXE, [RULES, NOT_OURS])


def frames(page) -> list:
    """The widgets of a page, each scrolled to, so that it loads."""
    found = []
    for one in page.locator("iframe").all():
        one.scroll_into_view_if_needed()
        found.append(one.element_handle().content_frame())
        found[-1].wait_for_load_state()
    return found


def faults(page, base: str, name: str, scheme: str) -> list[str]:
    """What is wrong with a page: what it loads, its scripts, its formulas, its accessibility, its width on a phone."""
    found, twice = [], []
    page.on("response", lambda r: found.append(f"status {r.status}: {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: found.append(f"other host: {r.url}") if foreign(r.url, base) else None)
    page.on("pageerror", lambda e: (twice if str(e) == TWICE else found).append(f"script error: {e}"))
    page.on("console", lambda m: found.append(f"console: {m.text} {m.location['url']}") if m.type == "error" else None)
    page.goto(base + name, wait_until="networkidle")
    found += twice[1:] + page.evaluate(FORMULAS)
    if page.evaluate("document.documentElement.dataset.theme") != scheme:
        found.append(f"not {scheme}")
    for size in (WIDE, PHONE):
        if size is PHONE:
            page.set_viewport_size(size)
            page.wait_for_timeout(
                500
            )  # the theme waits 300 ms before boxes that scroll now become stops of the Tab key
        for frame in [page.main_frame, *frames(page)]:
            found += [f"{size['width']} pixels: {fault}" for fault in accessibility(frame)]
            if size is PHONE:
                found += frame.evaluate(TOO_WIDE)
    return list(dict.fromkeys(found))


def foreign(url: str, base: str) -> bool:
    return url.startswith(("http", "ws")) and not url.startswith(base)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_in_the_browser(contexts, base, name, scheme):
    page = contexts[scheme].new_page()
    try:
        found = faults(page, base, name, scheme)
    finally:
        page.close()
    assert found == [], "\n".join(found)


TERMS = {  # what a reader may type -> a page that answers it, among the first three
    "soft split": "03-soft-split",
    "receptive field": "03-soft-split",
    "random features": "05-token-performer",
    "epsilon": "05-token-performer",
    "class token": "07-class-token-and-positions",
    "drop path": "08-transformer-blocks",
    "mixup": "11-training",
    "ghost": "13-cnn-designs",
    "safetensors": "14-released-weights",
    "rollout": "15-what-it-sees",
    "export": "16-fast-and-small",
    "data parallel": "17-many-gpus",
}


@pytest.mark.parametrize("term, answer", TERMS.items())
def test_search_finds(light, base, term, answer):
    light.goto(base + "book/index.html")
    light.keyboard.press("Control+k")
    light.keyboard.type(term)
    light.keyboard.press("Enter")
    light.wait_for_url("**/search.html?*")
    light.wait_for_function("/finished|did not match/.test(document.querySelector('.search-summary')?.textContent)")
    found = [
        Path(urlsplit(link.get_attribute("href")).path).stem for link in light.locator("#search-results li > a").all()
    ]
    assert answer in found[:3], found


def widget_pages() -> list[str]:
    return [name for name in PAGES if "<iframe" in (BOOK / name).read_text(encoding="utf-8")]


def test_widgets_are_where_they_should_be():
    assert {name[len("notebooks/") :][:2] for name in widget_pages()} >= {"03", "06", "15"}


@pytest.mark.parametrize("name", widget_pages())
def test_widgets_answer_to_keyboard_and_mouse(light, base, name):
    light.goto(base + name)
    for frame in frames(light):
        sheet = frame.locator("canvas[tabindex='0']")

        def shown(frame=frame, sheet=sheet):
            return frame.locator("#facts").inner_text(), sheet.evaluate("one => one.toDataURL()")

        def changed_by(act):
            before = shown()
            act()
            return all(old != new for old, new in zip(before, shown(), strict=True))

        sheet.focus()
        flat = sheet.evaluate("one => one.clientWidth > 3 * one.clientHeight")  # a sheet of one row has no up and down
        for key in ("ArrowRight", "ArrowLeft") if flat else ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
            assert changed_by(lambda key=key: light.keyboard.press(key)), key
        light.keyboard.press("ArrowRight")
        assert changed_by(lambda sheet=sheet: sheet.click(position={"x": 6, "y": 6})), "click"
        for slider in frame.locator("input[type=range]:visible").all():
            slider.focus()
            key = "ArrowLeft" if slider.evaluate("one => one.value === one.max") else "ArrowRight"
            assert changed_by(lambda key=key: light.keyboard.press(key)), slider.get_attribute("id")
        here = frame.evaluate("document.activeElement.id")
        light.keyboard.press("Shift+Tab")  # on to another control: the keyboard is not caught
        assert frame.evaluate("document.activeElement.id") != here


def test_code_is_copied(contexts, base, light):
    contexts["light"].grant_permissions(["clipboard-read", "clipboard-write"])
    light.goto(base + CHAPTERS[0])
    cell = light.locator("div.cell_input:visible .highlight").first
    cell.hover()
    cell.locator("button.copybtn").click()
    assert light.evaluate("navigator.clipboard.readText()").strip() == cell.locator("pre").inner_text().strip() != ""


def test_hidden_code_unfolds_by_keyboard(light, base):
    light.goto(base + CHAPTERS[0])
    fold = light.locator("details.hide").first
    assert "Show the code" in fold.inner_text() and not fold.locator("pre").is_visible()
    fold.locator("summary").focus()
    light.keyboard.press("Enter")
    assert "Hide the code" in fold.inner_text() and fold.locator("pre").is_visible()


def test_the_theme_follows_its_button_and_stays(contexts, base):
    context = contexts["light"].browser.new_context(viewport=WIDE)
    page = context.new_page()
    page.goto(base + CHAPTERS[0])
    for _ in range(3):
        if page.evaluate("document.documentElement.dataset.mode") == "dark":
            break
        page.locator(".theme-switch-button:visible").click()
    page.goto(base + CHAPTERS[1])
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    context.close()


def test_the_menu_opens_on_a_phone(light, base):
    light.set_viewport_size(PHONE)
    light.goto(base + CHAPTERS[0])
    entry = light.locator(".bd-sidebar-primary a", has_text="Soft split").or_(
        light.locator("#pst-primary-sidebar-modal a", has_text="Soft split")
    )
    assert not entry.first.is_visible()
    light.locator("button.primary-toggle").click()
    light.wait_for_timeout(400)
    assert accessibility(light.main_frame) == []
    entry.first.click()
    light.wait_for_url("**/03-soft-split.html")


# ---- and that each check can fail


SPOILED = """<!doctype html><html lang="en"><head><title>Spoiled</title><link rel="icon" href="data:,">
<script>document.documentElement.dataset.theme = localStorage.getItem('theme')</script>
<script>throw new Error('spoiled script')</script></head><body><main><article><h1>Spoiled</h1>
<p><a href="sound.html#there">sound</a> <a href="gone.html">a</a> <a href="sound.html#gone">b</a> <a href="#gone">c</a>
<a href="https://github.com/owner/name/blob/main/there.md">sound</a>
<a href="https://github.com/owner/name/blob/main/gone.md">d</a> <a href="https://github.com/owner/old">e</a>
<a href="https://exa_mple/">f</a> <a href="https://owner.github.io/name/gone.html">g</a>
<a href="https://owner.github.io/name/sound.html">sound</a></p>
<img src="a.png" alt="Four squares in a row, the last of them red."><img src="b.png">
<img src="c.png" alt="The plot in c.png, as it was drawn by the program.">
<img src="d.png" alt="Four squares in a row, the last of them red.">
<figure><img src="e.png" alt="Loss against epochs for three seeds."><figcaption>Fig. 1 Loss against epochs, for three
seeds.</figcaption></figure><svg aria-label="Three boxes in a row, joined by arrows."></svg>
<p style="color: #bbb; background: #fff">pale words</p><button></button><script src="http://other.example/x.js"></script>
<div style="width: 900px">wide</div>
<div style="overflow-x: auto" tabindex="0"><div style="width: 900px">scrolls</div></div>
<p>A formula of $$ x $$ and <code>$$</code></p><span class="math">raw</span><mjx-merror>undefined</mjx-merror>
<iframe title="a" srcdoc="<html lang=en><title>a</title><input><p style='width: 950px'>wide</p>"></iframe>
</article></main></body></html>"""


@pytest.fixture
def spoiled(tmp_path):
    (tmp_path / "spoiled.html").write_text(SPOILED, encoding="utf-8")
    (tmp_path / "sound.html").write_text('<p id="there">', encoding="utf-8")
    (tmp_path / "there.md").write_text("", encoding="utf-8")
    for name in "acde":
        (tmp_path / f"{name}.png").write_bytes(b"x" * 1000)
    return tmp_path


def test_files_that_are_spoiled(spoiled):
    page = "spoiled.html"
    assert [fault.split()[-1] for fault in dead_links(spoiled, page)] == [
        "gone.html",
        "sound.html#gone",
        "#gone",
        "b.png",
    ]
    assert odd_addresses(spoiled, page, "owner/name", spoiled) == [
        "https://github.com/owner/name/blob/main/gone.md",
        "https://github.com/owner/old",
        "https://exa_mple/",
        "https://owner.github.io/name/gone.html",
    ]
    assert [fault.split(":")[0] for fault in unsaid_figures(spoiled / page)] == [
        "does not say what it shows",  # b: nothing
        "does not say what it shows",  # c: a file name
        "says what another figure says",  # d
        "says what the caption says",  # e
        "no role=img",
    ]
    assert weight(spoiled / page) == len(SPOILED.encode()) + 4 * 1000


def test_a_page_that_is_spoiled_in_the_browser(contexts, spoiled):
    for scheme, other in (("light", "dark"), ("dark", "light")):
        page = contexts[scheme].new_page()
        page.add_init_script(f"addEventListener('load', () => document.documentElement.dataset.theme = '{other}')")
        with served(spoiled) as url:
            found = "\n".join(faults(page, url, "spoiled.html", scheme))
        page.close()
        for fault in (
            "status 404: http://127.0.0.1:",
            "other host: http://other.example/x.js",
            "script error: spoiled script",
            "MathJax error: undefined",
            "not rendered: raw",
            "raw mark-up: A formula",
            f"not {scheme}",
            "1280 pixels: axe color-contrast (serious): <p",
            "390 pixels: axe button-name (critical): <button",
            "390 pixels: axe label (critical): <input",  # in the frame
            "wider than a phone: 9",
            'sticks out of a phone: <div style="width: 900px">wide',
            'sticks out of a phone: <p style="width: 950px">wide',
        ):
            assert fault in found, found
        assert "scrolls" not in found
