"""A picture of a page of the built book, for the landing page and the README.

    make book && pip install -r tools/requirements-pages.txt && python tools/screenshot.py

Writes book/figures/a-page.png: chapter 3 as a reader sees it. CHROMIUM names the browser if it is not found by itself.
"""

import functools
import http.server
import subprocess
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PAGE, HEADING = "notebooks/03-soft-split.html", "pad-slide-lay-out"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def main() -> None:
    handler = functools.partial(Quiet, directory=ROOT / "_build" / "html")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = subprocess.run(["sh", ROOT / "tools" / "browser.sh"], stdout=subprocess.PIPE, text=True, check=True)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=found.stdout.strip(), args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 940}, color_scheme="light")
        page.goto(f"http://127.0.0.1:{server.server_port}/{PAGE}", wait_until="networkidle")
        # its third step: text, a cell with its assertion, its output, a figure
        page.evaluate(
            "heading => document.querySelectorAll(`#${heading} > .cell`)[2].previousElementSibling.scrollIntoView()",
            HEADING,
        )
        page.evaluate("scrollBy(0, -70)")  # out from under the bar at the top
        page.wait_for_timeout(500)
        page.screenshot(path=ROOT / "book" / "figures" / "a-page.png")
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main()
