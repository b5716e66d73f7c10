"""Sphinx's settings. `build.py` collects the pages; here is how they are shown."""
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "dino_edu"
author = "The dino_edu authors"
extensions = ["myst_nb"]
nitpicky = True  # a name of the package that is not there is an error, like any other dead link

nb_execution_mode = "off"  # pages show the outputs that notebooks were stored with
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "image/gif", 5)]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

html_theme = "sphinx_book_theme"
html_title = "dino_edu"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_theme_options = dict(show_navbar_depth=1, show_toc_level=2, use_download_button=False, navbar_persistent=[])
html_context = dict(default_mode="auto")
html_show_sourcelink = False
html_copy_source = False
add_module_names = False


def drawn(node, display):
    "A formula as MathML, with the thin space that belongs between ln and K."
    return re.sub(r"(<mi>(?:ln|log|cos|sin)</mi>)(?=<m[in])", r'\1<mspace width="0.167em" />', convert(node.astext().strip(), display=display))


def inline_formula(self, node):
    self.body.append(drawn(node, "inline"))
    raise SkipNode


def displayed_formula(self, node):
    self.body.append(f'<div class="math">{drawn(node, "block")}</div>')
    raise SkipNode


def setup(app):
    "Formulas become MathML, which browsers draw by themselves: no script, and nothing to fetch."
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.config.html_math_renderer = "mathml"
