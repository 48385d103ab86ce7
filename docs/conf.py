"""How Sphinx makes the documentation: `make docs`. Nothing is fetched from the internet, here or by the pages."""

import sys
from importlib import metadata
from pathlib import Path

from docutils.nodes import Node, SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference_of  # noqa: E402 - found where it was just said

project = "xpcs-stream"
author = "the xpcs-stream developers"
version = release = metadata.version("xpcs-stream")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]  # what is generated is included by pages

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # docstrings have single backticks

nitpicky = True
# Types of other packages, whose documentation is elsewhere, and our short names for some.
nitpick_ignore_regex = [("py:.*", r"(?!stream\.|hpc_bridge\.).*")]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_google_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "xpcs-stream"
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False


def _mathml(translator, node: Node) -> None:
    """Write a formula as MathML, which browsers draw by themselves."""
    is_block = node.tagname == "math_block"
    math = tex2mathml(node.astext(), as_block=is_block)
    translator.body.append(f'<div style="text-align: center">{math}</div>' if is_block else math)
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Write what is made from the code itself before anything is read."""
    app.add_html_math_renderer("mathml", inline_renderers=(_mathml, None), block_renderers=(_mathml, None))
    app.connect("builder-inited", lambda _: reference_of.write_all(HERE / "_generated"))
