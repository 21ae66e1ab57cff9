"""What the site needs beyond Sphinx: formulas, drawings, pages made from the code, checks."""

from __future__ import annotations

from sphinx.application import Sphinx

from . import checks, directives, mathml


def setup(app: Sphinx) -> dict[str, bool]:
    """Register everything with Sphinx."""
    mathml.setup(app)
    directives.setup(app)
    checks.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
