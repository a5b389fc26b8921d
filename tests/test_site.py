"""The site: it builds without a warning, holds every public name, loads nothing from elsewhere, has no dead link."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import switchcast

ROOT = Path(__file__).parents[1]
ADDRESS = re.compile(r'(?:href|src)="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("furo")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-qW", "--keep-going", "-c", "docs", "-d", str(folder / "trees"), "."]
    built = subprocess.run([*command, str(folder / "html")], capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    return folder / "html"


def test_every_public_name_has_an_entry(site):
    page = (site / "docs/reference.html").read_text()
    assert [name for name in switchcast.__all__ if f'id="switchcast.{name}"' not in page] == []


def test_links_and_anchors_lead_somewhere(site):
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    ids = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    broken = []
    for page, text in pages.items():
        for address in ADDRESS.findall(text):
            if re.match(r"[a-z]+:", address):
                continue
            target, _, anchor = unquote(address).partition("#")
            file = (page.parent / target.split("?")[0]).resolve() if target else page
            if not file.exists() or (anchor and file in ids and anchor not in ids[file]):
                broken.append((page.name, address))
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site):
    loads = re.compile(r'<(?:script|img|iframe)\b[^>]*\bsrc="(https?:)?//|<link\b[^>]*\bhref="(https?:)?//')
    assert [page.name for page in site.rglob("*.html") if loads.search(page.read_text())] == []
    styles = {
        sheet.name: re.findall(r"url\(\s*[\"']?(?:https?:)?//|@import", sheet.read_text())
        for sheet in site.rglob("*.css")
    }
    assert {name: found for name, found in styles.items() if found} == {}
