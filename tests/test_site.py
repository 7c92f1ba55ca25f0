"""The built site: it stands alone, and formulas are formulas."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")
pytest.importorskip("l2m4m")

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("no documentation here to build", allow_module_level=True)

ELSEWHERE = re.compile(r"\s*(?:\w+:)?//", re.I)
LOADED_BY_CSS = re.compile(r"""(?:url\(|@import|image-set\(|\dx\s*,)\s*["']?([^"')]+)""", re.I)
# With a host, whole or to be put in (`https://${e}/`), or cut before it (`"https://" + host`).
LITERAL = re.compile(
    r"""["'`]((?:https?:)?//[^"'`\s/]+[.}][^"'`\s]*|(?:https?|wss?)://(?=["'`]))""", re.I
)
LOADING = {"src", "href", "xlink:href", "data", "poster", "background", "manifest"}
# What the theme's script asks for: in browsers from before 2020, and on pages with these classes.
# Names of XML are no addresses.
DORMANT = {
    "http://www.w3.org/": None,
    "https://unpkg.com/resize-observer-polyfill": None,
    "https://unpkg.com/mermaid@": "mermaid",
    "https://api.github.com/": "md-source",
    "https://${e}/api/v4/": "md-source",
}
RAW_FORMULA = re.compile(r"\\[a-zA-Z(\[]|\$")


class Page(HTMLParser):
    """What a page (or an SVG picture) loads, says and holds.

    Attributes:
        loads: Addresses on other hosts that the browser would ask for without a click.
        text: What is not code, script or formula.
        formulas: Number of formulas.
        classes: Of all elements.
        ids: Of all elements.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.formulas = 0
        self.classes: set[str] = set()
        self.ids: set[str] = set()
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.formulas += tag == "math"
        if tag in ("code", "script", "style", "math"):
            self._inside.append(tag)
        for name, value in attributes:
            if name == "class":
                self.classes.update(value.split())
            elif name == "id":
                self.ids.add(value)
            elif name == "style":
                self.loads += loaded_by_css(value)
            elif name == "srcdoc":
                self.loads += Page(value).loads
            elif name == "content" and tag == "meta":  # a refresh; other texts name no address
                self.loads += re.findall(r"url=\s*((?:\w+:)?//\S+)", value, re.I)
            elif name in ("srcset", "imagesrcset"):
                self.loads += [part for part in value.split(",") if ELSEWHERE.match(part)]
            elif name in LOADING and tag != "a":
                self.loads += [value] * bool(ELSEWHERE.match(value))

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data
        elif self._inside[-1] == "style":
            self.loads += loaded_by_css(data)
        elif self._inside[-1] == "script":
            self.loads += loaded_by_script(data)


def loaded_by_css(text: str) -> list[str]:
    return [found for found in LOADED_BY_CSS.findall(text) if ELSEWHERE.match(found)]


def loaded_by_script(text: str) -> list[str]:
    return [found for found in LITERAL.findall(text) if not found.startswith(tuple(DORMANT))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CI builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {str(path.relative_to(site)): Page(path.read_text()) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_another_host(site, pages):
    loads = {name: page.loads for name, page in pages.items()}
    for kind, find in {
        "css": loaded_by_css,
        "js": loaded_by_script,
        "svg": lambda text: Page(text).loads,
    }.items():
        files = list(site.rglob(f"*.{kind}"))
        assert files, kind
        loads |= {str(path.relative_to(site)): find(path.read_text()) for path in files}
    assert {name: found for name, found in loads.items() if found} == {}
    assert [name for name, page in pages.items() if page.classes & set(DORMANT.values())] == []


def test_names_in_signatures_lead_somewhere(site):
    reference = (site / "api" / "index.html").read_text()
    ids = Page(reference).ids
    unlinked = set(re.findall(r'<span title="((?:alphafpn|torch|torchvision)\.[^"]+)"', reference))
    # What is explained where it is listed needs no link: attributes, under their class.
    assert {name for name in unlinked if name.rsplit(".", 1)[0] not in ids} == set()


def test_signatures_are_wrapped(site):
    reference = (site / "api" / "index.html").read_text()
    signatures = re.findall(r"doc-signature.*?<code>(.*?)</code>", reference, re.S)
    assert len(signatures) > 40
    lines = [line for code in signatures for line in re.sub("<[^>]+>", "", code).splitlines()]
    assert max(map(len, map(unescape, lines))) <= 100, (
        "mkdocstrings wraps with ruff: not installed?"
    )


def test_formulas_are_rendered(pages):
    assert pages["how-it-works/index.html"].formulas > 10
    raw = {name: RAW_FORMULA.findall(page.text) for name, page in pages.items()}
    assert {name: found for name, found in raw.items() if found} == {}


# The checker itself


@pytest.mark.parametrize(
    "html",
    [
        '<link rel="stylesheet" href="https://a.b/c.css">',
        '<script src="//a.b/c.js"></script>',
        '<img srcset="c.png 1x, HTTPS://a.b/c.png 2x">',
        "<style>@import 'https://a.b/c.css';</style>",
        '<p style="background: url(https://a.b/c.png)">',
        '<svg><image xlink:href="http://a.b/c.png"/></svg>',
        '<script>load("https://a.b/c.js")</script>',
        "<style>p { background: image-set('c.png' 1x, 'https://a.b/c.png' 2x) }</style>",
        '<iframe srcdoc="<img src=&quot;//a.b/c.png&quot;>"></iframe>',
        '<meta http-equiv="refresh" content="0; url=https://a.b/">',
        '<body background="//a.b/c.png">',
    ],
)
def test_what_is_loaded_is_found(html):
    assert len(Page(html).loads) == 1
    local = re.sub(r"(?i)(https?:)?//a\.b", "..", html)
    assert Page(local).loads == []


def test_an_address_put_together_is_found():
    assert loaded_by_script('load("https://" + host + path)') == ["https://"]
    assert loaded_by_script("load(`//${host}/c.js`)") == ["//${host}/c.js"]


def test_links_and_code_are_no_loads():
    page = Page('<a href="https://a.b/">$</a> <code>\\alpha $x$</code> <math>\\beta</math>')
    assert page.loads == []
    assert RAW_FORMULA.findall(page.text) == ["$"]
