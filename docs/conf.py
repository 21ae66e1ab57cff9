"""How Sphinx builds the site: `nox -s docs` runs the examples and writes the pages."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Set before any example imports a library: examples run on the CPU on any machine, jax has four
# devices for a mesh, and Keras writes no settings file.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("PJRT_NPROC", "16")  # threads enough for all devices
os.environ.setdefault("KERAS_BACKEND", "jax")
if "KERAS_HOME" not in os.environ:
    os.environ["KERAS_HOME"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["KERAS_HOME"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import polyce

project = "polyce"
author = "polyce contributors"
copyright = author
version = release = polyce.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",  # for its role `autolink`
    "sphinx.ext.doctest",
    "myst_parser",
    "numpydoc",
    "polyce_site",
]
exclude_patterns = ["_build", "_ext"]
nitpicky = True
# Names of other projects are not linked, since that would download their indexes.
nitpick_ignore_regex = [("py:.*", r"(numpy|torch|jax)\..*")]

# Pages
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# Docstrings: single backticks name a parameter or, where it exists, an object to link to.
default_role = "autolink"
autosummary_generate = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False

# Examples: a `testcode` block must print what the `testoutput` block after it says. Those in
# docstrings are run by `nox -s doctest`.
doctest_test_doctest_blocks = ""
doctest_default_flags = 0

# Appearance
html_theme = "furo"
html_title = f"polyce {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
