"""Formulas as MathML, which browsers show without a script, a font or another site."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def setup(app: Sphinx) -> None:
    """Add it to the choices of `html_math_renderer`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_convert(node, as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(_convert(node, as_block=True))
    raise nodes.SkipNode


def _convert(node: nodes.Element, *, as_block: bool) -> str:
    # docutils knows \bigl and \bigr, but not \big, which takes its side from the bracket.
    formula = re.sub(r"\\(big|Big)(?=\()", r"\\\1l", node.astext())
    formula = re.sub(r"\\(big|Big)(?=\))", r"\\\1r", formula)
    try:
        return tex2mathml(formula, as_block=as_block)
    except MathError as error:
        logger.warning("formula: %s", error, location=node)
        return ""
