"""Rules that every page must keep; each violation is a warning, which ends the build.

Each page says in its first sentence who it is for and links to the API it is about, no page is
longer than one reads in a sitting, code that looks like Python is code that is run, and the
reference has every public name.
"""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import polyce
import polyce.testing

logger = logging.getLogger(__name__)
PYTHON = {"python", "py", "pycon", "python3", "default"}
MOST_WORDS = 1500


def setup(app: Sphinx) -> None:
    """Run the checks when a page has been read, and when all have been."""
    app.connect("doctree-read", check_page)
    app.connect("env-check-consistency", check_reference)


def check_page(app: Sphinx, doctree: nodes.document) -> None:
    """Check one page."""
    page = app.env.docname
    first = next(doctree.findall(nodes.paragraph), None)
    if first is None or not first.astext().startswith("For "):
        logger.warning("the first sentence does not say who the page is for", location=page)
    links = [ref for ref in doctree.findall(addnodes.pending_xref) if ref["refdomain"] == "py"]
    if not links and not list(doctree.findall(addnodes.desc)):
        logger.warning("no link to the API", location=page)
    words = Path(app.env.doc2path(page)).read_text(encoding="utf-8").split()
    if len(words) > MOST_WORDS and not page.startswith("reference/"):
        logger.warning("%d words, more than %d", len(words), MOST_WORDS, location=page)
    for block in doctree.findall(nodes.literal_block):
        # Included files are run elsewhere, and `testcode` blocks are marked by their kind.
        is_run = "testnodetype" in block or "source" in block
        if block.get("language") in PYTHON and not is_run:
            logger.warning("code that nothing runs: use testcode", location=block)


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Find public names that the reference lacks."""
    documented = env.domains.python_domain.objects
    for module in (polyce, polyce.testing):
        for name in module.__all__:
            if not name.startswith("__") and f"{module.__name__}.{name}" not in documented:
                logger.warning("%s.%s is public and not in the reference", module.__name__, name)
