"""The documentation as a site: `make docs` writes it to outputs/site; warnings are errors.

Its pages are README's first screen with the contents of docs/README.md, the other pages of docs/, and the docstrings of
the public names. The folder is the repository's root, so that relative links are the same here and on a forge.
"""

import re
import shutil
import sys
from os.path import relpath
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # autodoc reads the code beside these pages, whatever is installed

project = html_title = "Switchcast"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**"]
exclude_patterns = [".*", "outputs", "docs/README.md"]
html_theme = "furo"
html_copy_source = html_show_sphinx = html_show_copyright = html_use_index = False
highlight_language = "none"  # Python blocks say so; others are commands and output
myst_heading_anchors = 4
default_role = "code"  # docstrings write `name`
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}

SECTION = re.compile(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([\w./-]+)((?:#[\w-]+)?)\)")
PICTURE_OR_LINK = re.compile(r"\]\((?!https?://|#)([^()\s]+)\)")


def moved(text: str, source: str, target: str) -> str:
    """A text of one folder with its relative links as they are in another folder, both from the root."""
    return PICTURE_OR_LINK.sub(lambda link: f"]({relpath(Path(source, link[1]), target)})", text)


def contents() -> str:
    """The sections of docs/README.md, each with a tree of the pages that it links to."""
    said = []
    for title, body in SECTION.findall(moved((ROOT / "docs/README.md").read_text(), "docs", ".")):
        pages = "\n".join(f"{name} <{place}>" for name, place, _ in LINK.findall(body))
        said.append(f"## {title}\n{body}\n```{{toctree}}\n:caption: {title}\n:hidden:\n\n{pages}\n```\n")
    return "\n".join(said)


def page_text(app: Sphinx, page: str, text: list[str]) -> None:
    """Cuts README into the landing page and the limits, and unlinks folders and pages that the site does not have."""
    if page == root_doc:
        text[0] = text[0].split("\n## Try it")[0].replace("(#limits)", "(docs/limits.md)") + "\n\n" + contents()
    elif page == "docs/limits":
        text[0] = "# Limits\n" + moved(dict(SECTION.findall((ROOT / "README.md").read_text()))["Limits"], ".", "docs")
    elif page.startswith("docs/results/") and page != "docs/results/README":  # one of many folders, linked by figures
        text[0] = "---\norphan: true\n---\n" + text[0]

    def known(link: re.Match[str]) -> str:
        place = (ROOT / page).parent / link[2]
        file = place.resolve()
        missing = file.suffix == ".md" and app.env.path2doc(file) not in app.env.found_docs
        return link[1] if file.is_dir() or missing else link[0]

    text[0] = LINK.sub(known, text[0])


def link_sources(app: Sphinx, document: nodes.document) -> None:
    """Makes links to files of the code lead to copies that a browser shows, instead of downloads."""
    page = Path(document["source"])
    for link in list(document.findall(download_reference)):
        file = (page.parent / link["reftarget"]).resolve().relative_to(ROOT)
        copy = Path("source", f"{file.as_posix()}.txt")
        (app.outdir / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, app.outdir / copy)
        address = relpath(copy, page.parent.relative_to(ROOT))
        link.replace_self(nodes.reference("", "", *link.children, refuri=address))


def finish(app: Sphinx, failed: Exception | None) -> None:
    """Makes the landing page index.html as well."""
    if not failed:
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    """Connects the functions above to the build."""
    app.connect("source-read", page_text)
    app.connect("doctree-read", link_sources, priority=100)  # before Sphinx collects downloads
    app.connect("build-finished", finish)
