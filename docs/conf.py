"""Sphinx: the API reference from docstrings, and the notebooks as `.ci/run notebooks` left them."""

import ast
import importlib
import inspect
import pathlib
import re
import textwrap

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import optax_curv

ROOT = pathlib.Path(__file__).parents[1]

project = "optax_curv"
author = "The optax_curv authors"
version = release = optax_curv.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["build", "jupyter_execute"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_title = f"optax_curv {version}"
default_role = "literal"  # `names` in docstrings
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
suppress_warnings = [
    "myst.xref_missing",
    "mystnb.unknown_mime_type",
]  # the README links to files of the repository


# Emphasis as a whole, or a mark that is none.
MARK = re.compile(r"(\*\*?)[A-Za-z][\w ,.]*(?<! )\1(?![\w*])|(?<!\\)[*|](?=\S)|(?<=\S)\|")
# An example up to the next empty line, or a name in backticks, which a paragraph may break.
CODE = re.compile(r"^ *>>>(?:.*\n)*?(?=\s*\n|\Z)|(``?)(?:[^`\n]|\n(?! *\n))+\1", re.MULTILINE)


def escape_plain_marks(app, what, name, obj, options, lines):
    """Escapes what is no markup: docstrings are written to be read as they are.

    [*stack, n] and |H| are mathematics, and `name`s is a plural.
    """
    text, end = "\n".join(lines), 0
    pieces = []
    for code in [*CODE.finditer(text), None]:
        plain = text[end : code.start()] if code else text[end:]
        if end and plain[:1].isalpha():
            pieces.append("\\ ")
        pieces.append(MARK.sub(lambda mark: ("\\" if len(mark[0]) == 1 else "") + mark[0], plain))
        if code:
            pieces.append(code[0])
            end = code.end()
    lines[:] = "".join(pieces).split("\n")


def list_names(app, docname, source):
    """Makes of a block `{names} MODULE` a table of its names, then what each of them is."""

    def written(block):
        module, names = importlib.import_module(block[1]), block[2].split()
        things = [getattr(module, name) for name in names]
        kinds = ["class" if inspect.isclass(thing) else "function" for thing in things]
        lines = [f".. currentmodule:: {block[1]}", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names] + [""]
        lines += [f".. auto{kind}:: {name}" for kind, name in zip(kinds, names, strict=True)]
        return "```{eval-rst}\n" + "\n".join(lines) + "\n```"

    block = re.compile(r"```\{names\} (\S+)\n(.*?)```", re.DOTALL)
    source[0] = block.sub(written, source[0])


def signature_of_source(app, what, name, obj, options, signature, returned):
    """Writes a function's types and defaults as its source does, and not as they are evaluated."""
    if what != "function" or signature is None:
        return None
    function = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    plain = re.sub(r"static\((.*?)\)", r"\1", ast.unparse(function.args))
    return f"({plain})", ast.unparse(function.returns)


def mathml(self, node):
    """Writes a formula as MathML, which browsers show without a script from elsewhere."""
    block = isinstance(node, nodes.math_block)
    self.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


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
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("source-read", list_names)
    app.connect("doctree-resolved", link_to_pages)
    app.connect("autodoc-process-signature", signature_of_source)
    app.connect("autodoc-process-docstring", escape_plain_marks, priority=400)  # before napoleon
