"""Print the built book as one PDF: python tools/pdf.py [BOOK] [--output FILE]

BOOK is the folder that `make book` writes, _build/html; the PDF goes into it, as t2t-vit.pdf. A headless Chromium
gathers the articles of all pages into one document, in the order of the side bar. So links between chapters stay links,
and page numbers run through. Paper has its own style, book/_static/print.css.

It needs tools/requirements-pdf.txt and a Chromium or Chrome; CHROMIUM names another one (see tools/browser.sh).
"""

import argparse
import functools
import http.server
import re
import subprocess
import threading
from pathlib import Path

import pikepdf
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 10

PAPER = """
@page { size: A4; margin: 22mm 15mm 20mm; font: 9pt sans-serif; color: #555; @bottom-center { content: counter(page) } }
@page :first { @bottom-center { content: none } }
.printed-contents { break-before: page }
"""

# in the browser, on any page of the book; every id gets the number of its page before it, and links follow
GATHER = """async ({paper, note}) => {
  const article = (where) => where.querySelector("article.bd-article");
  const pages = [...document.querySelectorAll("nav.bd-docs-nav a.internal")].map((link) => {
    const url = new URL(link.href);
    url.hash = "";
    return {url, title: link.textContent.trim()};
  });
  const number = (url) => pages.findIndex((page) => page.url.href == url.origin + url.pathname);

  const book = article(document);
  book.replaceChildren();
  for (let box = book; box != document.body; box = box.parentNode)  // a side bar would leave an empty first page
    for (const other of [...box.parentNode.children]) if (other != box) other.remove();

  const contents = document.createElement("nav");
  contents.className = "printed-contents";
  contents.innerHTML = "<h2>Contents</h2><ul></ul><p></p>";
  contents.lastChild.textContent = note;
  for (const [i, {url, title}] of pages.entries()) {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
    const body = article(new DOMParser().parseFromString(await answer.text(), "text/html"));
    body.querySelector("h1").textContent = title;
    for (const element of body.querySelectorAll("[id]")) element.id = `page-${i}.${element.id}`;
    for (const element of body.querySelectorAll("[src]")) element.src = new URL(element.getAttribute("src"), url);
    for (const element of body.querySelectorAll("a[href]")) {
      const to = new URL(element.getAttribute("href"), url);
      const page = number(to);
      if (page >= 0) element.setAttribute("href", `#page-${page}${decodeURIComponent(to.hash).replace("#", ".")}`);
      else if (to.origin == url.origin) element.removeAttribute("href");  // a file beside the book
    }
    for (const element of body.querySelectorAll("details")) element.open = true;
    for (const element of body.querySelectorAll("[loading]")) element.loading = "eager";
    const section = document.createElement("section");
    section.id = section.style.page = `page-${i}`;
    section.append(...body.childNodes);
    book.append(section);
    if (!i) continue;
    paper += `@page page-${i} { @top-right { content: ${JSON.stringify(title)} } }`;
    const link = Object.assign(document.createElement("a"), {href: `#${section.id}`, textContent: title});
    contents.querySelector("ul").appendChild(document.createElement("li")).append(link);
  }
  book.firstChild.append(contents);
  document.head.appendChild(document.createElement("style")).textContent = paper;
  document.title = pages[0].title;

  await MathJax.typesetPromise([book]);
  await Promise.all([document.fonts.ready, ...[...book.querySelectorAll("img")].map((image) => image.decode())]);
  const headings = [...book.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter((heading) => heading.checkVisibility());
  return {
    pages: pages.length,
    headings: headings.map((heading) => heading.textContent.replace(/[#\\u00b6]\\s*$/, "").trim()),
    dead: [...book.querySelectorAll("a[href^='#']")].map((link) => link.getAttribute("href"))
      .filter((href) => !document.getElementById(href.slice(1))),
  };
}"""


def page_with_mathematics(book: Path) -> str:
    """A page that loads MathJax, for all the others to be gathered into."""
    for page in sorted(book.glob("notebooks/*.html")):
        if "MathJax" in page.read_text(encoding="utf-8"):
            return page.relative_to(book).as_posix()
    raise SystemExit(f"no chapter in {book}: run make book first")


def print_pages(book: Path, output: Path) -> dict:
    """Write what the browser prints; returns what GATHER found."""
    browser_path = subprocess.run(
        ["sh", ROOT / "tools" / "browser.sh"], stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    if not browser_path:
        raise SystemExit(1)  # it has said what to install
    stated = (ROOT / "t2t_ref" / "weights" / "_version.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.+)"', stated)[1]
    note = (
        f"Version {version}, printed from the web pages of the book. The code that draws the figures is left out here, "
        "and what moves stands still; both are on the web pages. Answers to the exercises are open."
    )
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=book))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            page = browser.new_page(color_scheme="light", viewport={"width": 680, "height": 900})  # 180 mm: see PAPER
            page.emulate_media(media="print")
            page.set_default_timeout(MINUTES * 60_000)
            page.goto(f"http://127.0.0.1:{server.server_port}/{page_with_mathematics(book)}", wait_until="networkidle")
            page.add_style_tag(path=ROOT / "book" / "_static" / "print.css")
            found = page.evaluate(GATHER, {"paper": PAPER, "note": note})
            page.wait_for_load_state("networkidle")
            for widget in page.locator("iframe").all():  # it draws itself once it is seen
                widget.scroll_into_view_if_needed()
                page.wait_for_timeout(1000)
            page.pdf(path=output, prefer_css_page_size=True, print_background=True, tagged=True, outline=True)
            browser.close()
    finally:
        server.shutdown()
    if found["dead"]:
        raise SystemExit(f"links to nowhere: {' '.join(found['dead'])}")
    return found


def finish(output: Path, headings: list[str]) -> int:
    """Name the entries of the outline after the headings, and pack the file; returns the number of sheets.

    Chromium writes a title twice where a heading moves to the next sheet.
    """

    def entries(items):
        for item in items:
            yield item
            yield from entries(item.children)

    with pikepdf.open(output, allow_overwriting_input=True) as pdf:
        with pdf.open_outline(max_depth=6) as outline:
            found = list(entries(outline.root))
            if len(found) != len(headings):
                raise SystemExit(f"{len(headings)} headings, but {len(found)} entries in the outline")
            for item, title in zip(found, headings, strict=True):
                item.title = title
                item.is_closed = True
        pdf.docinfo["/Creator"] = "tools/pdf.py"
        pdf.save(output, object_stream_mode=pikepdf.ObjectStreamMode.generate, recompress_flate=True)
        return len(pdf.pages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("book", nargs="?", type=Path, default=ROOT / "_build" / "html")
    parser.add_argument("--output", type=Path, help="BOOK/t2t-vit.pdf")
    options = parser.parse_args()
    output = options.output or options.book / "t2t-vit.pdf"
    found = print_pages(options.book, output)
    sheets = finish(output, found["headings"])
    print(f"wrote {output}: {found['pages']} pages of the book, {sheets} sheets, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
