"""Sphinx: the API reference from docstrings, and the notebooks as `.ci/run notebooks` left them."""

import pathlib
import re

from docutils import nodes

import optax_curv

ROOT = pathlib.Path(__file__).parents[1]

project = "optax_curv"
author = "The optax_curv authors"
version = release = optax_curv.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["build", "jupyter_execute"]
html_theme = "furo"
html_title = f"optax_curv {version}"
default_role = "literal"  # `names` in docstrings
autodoc_typehints = "none"  # docstrings say more than Any
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
suppress_warnings = [
    "myst.xref_missing",
    "mystnb.unknown_mime_type",
]  # the README links to files of the repository


def escape_plain_marks(app, what, name, obj, options, lines):
    """Escapes what is no markup: docstrings are written to be read as they are.

    [*stack, n] and |H| are mathematics, and `name`s is a plural.
    """
    for number, line in enumerate(lines):
        parts = line.split("`")
        if not line.lstrip().startswith((">>>", "...")):
            parts[::2] = [
                re.sub(r"(?<!\\)([*|])(?=\S)|(?<=\S)\|", lambda found: "\\" + found[0], p)
                for p in parts[::2]
            ]
            parts[2::2] = ["\\ " + p if p[:1].isalpha() else p for p in parts[2::2]]
        lines[number] = "`".join(parts)


PAGES = {"CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing"}


def link_to_pages(app, doctree, docname):
    """Leads the README's links to files of the repository to these pages, or makes them text."""
    for node in list(doctree.findall(nodes.reference)):
        target = node.get("refid", "")
        if not target or not (ROOT / target).exists():
            continue
        page = PAGES.get(target)
        if target.startswith("benchmarks/"):
            page = "benchmarks"
        elif target.startswith("optax_curv/"):
            page = "_modules/" + target.removesuffix(".py")
        if page is None:
            node.replace_self(node.children)
        else:
            del node["refid"]
            node["refuri"] = app.builder.get_relative_uri(docname, page)


def setup(app):
    app.connect("doctree-resolved", link_to_pages)
    app.connect("autodoc-process-docstring", escape_plain_marks, priority=400)  # before napoleon
