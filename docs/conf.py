"""The site of the documentation: ``make docs`` builds it from the pages of this folder and from docstrings.

The source folder of Sphinx is the root of the repository, so that links of the pages to ``../benchmarks``
lead to the same places in the repository and on the site.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import pkgutil
import re
import sys
import typing
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import distmatch
from distmatch.base import rules
from distmatch.training import options, pipeline_options

DOCS = Path(__file__).parent
API, NOTEBOOKS = DOCS / "api", DOCS / "notebooks"

project = "distmatch"
author = "distmatch contributors"
copyright = "distmatch contributors, Apache-2.0"
version = release = distmatch.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "benchmarks/*.md",
    "recipes/*.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "src", "tests"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
myst_linkify_fuzzy_links = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {  # a checked number is shown as a number
    name: getattr(typing.get_args(value)[0], "__name__", str(typing.get_args(value)[0]))
    for module in (rules, pipeline_options, options)
    for name, value in vars(module).items()
    if typing.get_origin(value) is typing.Annotated
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"distmatch {release}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
html_extra_path = ["site/index.html"]
html_static_path = ["site/site.css"]
html_css_files = ["site.css"]
highlight_language = "text"  # of fences without a language: commands and what they print
pygments_style = "tango"
pygments_dark_style = "monokai"

# Types in signatures are those of torch and of modules without a page; what a text names has to exist.
nitpick_ignore_regex = [("py:class", ".*"), ("py:obj", r"typing\..*")]
if not NOTEBOOKS.is_dir():  # a source archive, which leaves them out
    suppress_warnings = ["toc.not_readable", "myst.xref_missing"]


def modules_of_pages() -> set[str]:
    """The modules that the snippets of the pages import from."""
    text = "\n".join(page.read_text() for page in DOCS.glob("*.md"))
    return set(re.findall(r"^ *from (distmatch\.[\w.]+) import", text, re.MULTILINE))


def public_modules() -> dict[str, list[str]]:
    """For each subpackage: its packages with ``__all__``, and further modules that the pages import from."""
    named = modules_of_pages()
    found: dict[str, list[str]] = {}
    for info in pkgutil.walk_packages(distmatch.__path__, "distmatch."):
        room = info.name.split(".")[1]
        if room == "cli":
            continue
        if info.ispkg:
            public = hasattr(importlib.import_module(info.name), "__all__")
        else:
            public = info.name in named
        if public:
            found.setdefault(room, []).append(info.name)
    return found


def overview(documented: dict[str, str]) -> list[str]:
    """A table of the names of ``distmatch`` itself, each with the first line of its docstring."""
    lines = ["```{eval-rst}", ".. list-table::", "   :widths: 30 70", ""]
    for name in distmatch.__all__:
        value = getattr(distmatch, name)
        role, target = (
            ("mod", value.__name__) if inspect.ismodule(value) else ("obj", documented.get(name, name))
        )
        if name.startswith("__"):
            continue
        first = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
        target = target if "." in target else f"distmatch.{target}"
        lines += [f"   * - :py:{role}:`{name} <{target}>`", f"     - {plain(first)}"]
    return [*lines, "```", ""]


def write_api(app: Sphinx) -> None:
    """Write the pages of the API reference, and remove those of packages that there are no more."""
    API.mkdir(exist_ok=True)
    rooms = public_modules()
    # What a package shows too is documented there, and only listed on the first page.
    homes = {
        name: f"{module}.{name}"
        for names in rooms.values()
        for module in names
        for name in getattr(importlib.import_module(module), "__all__", ())
        if getattr(distmatch, name, None) is getattr(importlib.import_module(module), name)
    }
    pages = {"distmatch": ["distmatch"]} | {f"distmatch.{room}": names for room, names in rooms.items()}
    for page in API.glob("*.md"):
        if page.stem not in (*pages, "index"):
            page.unlink()
    for page, names in pages.items():
        lines = [f"# {page}", ""]
        if page == "distmatch":
            lines += overview(homes)
        for name in names:
            if name != page:
                lines += [f"## {name}", ""]
            lines += ["```{eval-rst}", f".. automodule:: {name}", "   :members:"]
            if hasattr(importlib.import_module(name), "__all__"):
                lines += ["   :imported-members:"]
            if name == "distmatch":
                lines += [f"   :exclude-members: {', '.join(sorted(homes))}"]
            lines += ["```", ""]
        write(API / f"{page}.md", lines)
    write(
        API / "index.md",
        ["# API reference", "", "One page for each subpackage.", "", "```{toctree}", *pages, "```"],
    )


def write(path: Path, lines: list[str]) -> None:
    """Write a page, unless it is already there: Sphinx then need not read it again."""
    text = "\n".join(lines)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def write_notebooks(app: Sphinx) -> None:
    """Write a page for each notebook, with what its cells showed when it was run: nothing is run here."""
    for file in NOTEBOOKS.glob("*.ipynb"):
        lines: list[str] = []
        for cell in json.loads(file.read_text())["cells"]:
            source = "".join(cell["source"])
            lines += ["```python", source, "```", ""] if cell["cell_type"] == "code" else [source, ""]
            for output in cell.get("outputs", []):
                shown = output.get("data", {})
                if "image/png" in shown:
                    picture = NOTEBOOKS / f"{file.stem}-{len(lines)}.png"
                    picture.write_bytes(base64.b64decode(shown["image/png"]))
                    lines += [f"![Output of the cell above]({picture.name})", ""]
                else:
                    text = "".join(output.get("text", shown.get("text/plain", "")))
                    lines += ["```{code-block} text", ":caption: Output", "", text.rstrip(), "```", ""]
        lines.insert(1, f"[This page as a notebook]({file.name}), run by `python docs/make_notebooks.py`.\n")
        write(file.with_suffix(".md"), lines)


def plain(text: str) -> str:
    """A line of a docstring in which ``*`` and ``|`` of formulas are no markup; code and *words* stay."""
    parts = re.split(r"(``.*?``|`[^`]*`|\*\w[^*]*\*(?!\w))", text)
    kept = [
        part if part[:1] in ("`", "*") and len(part) > 1 else re.sub(r"([*|])", r"\\\1", part)
        for part in parts
    ]
    return "".join(kept)


def escape(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Called for each docstring before it is read as reStructuredText: formulas of its text are escaped."""
    literal: int | None = None  # the indentation of the line that begins a formula or a literal block
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if literal is None and (line.lstrip().startswith(".. math::") or line.endswith("::")):
            literal = indent
        elif literal is None:
            lines[i] = plain(line)


ROLES = ("func", "data", "meth", "attr", "exc", "mod", "obj")


@cache
def known_names() -> set[str]:
    """The names that our modules and torch define, and those of the members of our classes."""
    names = {"deepcopy", *vars(sys.modules["torch"])}
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "distmatch"]:
        names |= set(vars(module))
        names |= {
            member for value in vars(module).values() if inspect.isclass(value) for member in dir(value)
        }
    return names


def link(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement
) -> nodes.Element | None:
    """Called for each name that Sphinx does not find as it is written.

    A name of the module that defines a function is looked up where the function is documented. One that is
    on no page, but exists, is shown without a link; only one that does not exist is a warning.
    """
    if node["refdomain"] != "py" or node["reftype"] not in ROLES:
        return None
    name = node["reftarget"].rpartition(".")[2]
    objects = env.domains["py"].objects
    found = [full for full in objects if full.rpartition(".")[2] == name]
    if len(found) == 1:
        entry = objects[found[0]]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, shown, found[0])
    return shown if found or name in known_names() else None


def _mathml(visitor: object, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers show without a script."""
    block = isinstance(node, nodes.math_block)
    formula = str(tex2mathml(node.astext(), as_block=block))
    shown = f'<div class="formula">{formula}</div>' if block else formula
    visitor.body.append(shown)  # type: ignore[attr-defined]
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_api)
    app.connect("builder-inited", write_notebooks)
    app.connect("missing-reference", link)
    app.connect("autodoc-process-docstring", escape, priority=0)  # before napoleon
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))


html_math_renderer = "mathml"
