"""The documentation as a browser shows it, on a screen of 390 pixels and without a network."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

import pytest

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 390
_MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if find_spec(name) is None]
_MISSING += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(_MISSING), reason=f"needs the extra [docs], chromium and chromedriver; lacks {_MISSING}"
)

LOOK = """
const equations = document.querySelectorAll(".arithmatex");
return {
  width: document.documentElement.scrollWidth,
  equations: equations.length,
  rendered: document.querySelectorAll(".arithmatex > .katex, .arithmatex > .katex-display").length,
  cut: [...equations].filter(e => e.tagName == "DIV" && e.scrollWidth > e.clientWidth + 1).length,
  cut_tables: [...document.querySelectorAll(".md-typeset__scrollwrap")]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 40)),
  tallest: Math.max(0, ...[...equations].map(e => e.getBoundingClientRect().height)),
  links: [...document.querySelectorAll("a[href]")].map(a => a.href),
  ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  resources: performance.getEntriesByType("resource").map(r => r.name),
};
"""


@dataclass
class Page:
    width: int
    equations: int
    rendered: int
    cut: int
    cut_tables: list[str]
    tallest: float
    links: list[str]
    ids: list[str]
    resources: list[str]


class Browser:
    """As much of the WebDriver protocol as these tests need."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/session"
        options = {
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            "mobileEmulation": {"deviceMetrics": {"width": WIDTH, "height": 844, "pixelRatio": 1}},
        }
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        self._url += "/" + self._call("POST", "", {"capabilities": wanted})["sessionId"]

    def look(self, url: str) -> Page:
        self._call("POST", "/url", {"url": url})
        after_fonts = f"document.fonts.ready.then(() => arguments[0]((() => {{{LOOK}}})()));"
        return Page(**self._call("POST", "/execute/async", {"script": after_fonts, "args": []}))

    def close(self) -> None:
        self._call("DELETE", "")

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    site = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def pages(base: str) -> dict[str, Page]:
    """Every page that can be reached from the first one, by its address."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            started = next(line for line in driver.stdout if "started successfully" in line)
            browser = Browser(int(started.rsplit(" ", 1)[1].strip().rstrip(".")))
            found: dict[str, Page] = {}
            waiting = [base]
            while waiting:
                url = waiting.pop()
                if url in found:
                    continue
                found[url] = browser.look(url)
                links = {urldefrag(link).url for link in found[url].links}
                waiting += [link for link in links if link.startswith(base) and link[-1] == "/"]
            browser.close()
        finally:
            driver.terminate()
    return found


def test_every_page_can_be_reached(base: str, pages: dict[str, Page]) -> None:
    sources = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    expected = {base + path.with_suffix("").as_posix() + "/" for path in sources}
    assert expected - {base + "index/"} | {base} == set(pages)


def test_equations_are_rendered(pages: dict[str, Page]) -> None:
    assert {url: p.equations for url, p in pages.items()} == {
        url: p.rendered for url, p in pages.items()
    }
    tall = max(page.tallest for page in pages.values())
    assert tall > 40  # a fraction or a sum stands higher than a line of text


def test_no_equation_is_cut_on_a_phone(pages: dict[str, Page]) -> None:
    assert {url: p.cut for url, p in pages.items() if p.cut} == {}


def test_no_table_is_cut_on_a_phone(pages: dict[str, Page]) -> None:
    assert {url: p.cut_tables for url, p in pages.items() if p.cut_tables} == {}


def test_nothing_comes_from_elsewhere(base: str, pages: dict[str, Page]) -> None:
    for page in pages.values():
        assert [name for name in page.resources if not name.startswith((base, "data:"))] == []


def test_every_internal_link_leads_somewhere(base: str, pages: dict[str, Page]) -> None:
    broken = set()
    for url, page in pages.items():
        for link in page.links:
            target, fragment = urldefrag(link)
            if not target.startswith(base):
                continue
            if target in pages:
                if fragment and fragment not in pages[target].ids:
                    broken.add((url, link))
            else:
                with urllib.request.urlopen(target, timeout=30) as answer:  # raises if not there
                    assert answer.status == 200
    assert broken == set()


def test_no_page_is_wider_than_a_phone(pages: dict[str, Page]) -> None:
    assert {url: p.width for url, p in pages.items() if p.width > WIDTH} == {}
