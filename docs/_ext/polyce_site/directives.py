"""Directives: `generated` inserts text made from the code, `drawing` an inline figure."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from . import errors, plot, tables

PAGES = {
    "support": tables.support,
    "libraries": tables.libraries,
    "tolerances": tables.tolerances,
    "errors": errors.table,
}
DRAWINGS = {"error-against-margin": plot.error_against_margin}


def setup(app: Sphinx) -> None:
    """Register both."""
    app.add_directive("generated", Generated)
    app.add_directive("drawing", Drawing)


class Generated(SphinxDirective):
    """Markdown written by a function of this package."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse what the function named in the argument returns."""
        self.env.note_reread()
        return self.parse_text_to_nodes(PAGES[self.arguments[0]](), allow_section_headings=True)


class Drawing(SphinxDirective):
    """An SVG within the page: a file beside it, or one drawn by a function of this package."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Insert the SVG, with a description for those who cannot see it."""
        name = self.arguments[0]
        if name in DRAWINGS:
            self.env.note_reread()
            svg = DRAWINGS[name]()
        else:
            relative, absolute = self.env.relfn2path(name)
            self.env.note_dependency(relative)
            svg = Path(absolute).read_text(encoding="utf-8")
        label = escape(" ".join(self.options["alt"].split()))
        svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        caption = nodes.container("", *self.parse_content_to_nodes())
        return [
            nodes.raw("", f'<figure class="drawing">{svg}<figcaption>', format="html"),
            caption,
            nodes.raw("", "</figcaption></figure>", format="html"),
        ]
