"""How `make docs` builds the site: Sphinx reads the Markdown of this folder (MyST), furo gives it its looks."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = html_title = "supar-sweep"
author = copyright = "The supar-sweep contributors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_preserve_defaults = True
default_role = "code"  # `name` in a docstring
highlight_language = "none"  # of a block that names no language

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"


def mathml(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write an equation as MathML, which browsers draw by themselves: MathJax would be fetched from the net."""
    block = isinstance(node, nodes.math_block)
    equation = tex2mathml(node.astext(), as_block=block)
    writer.body.append(f'<div class="math">{equation}</div>' if block else equation)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the renderer; Sphinx calls this."""
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
