"""How Sphinx builds the documentation; `scripts/docs.sh` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
# The package is documented as it is in this clone, whichever one is installed.
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

from ganscale import __version__  # noqa: E402

project = "ganscale"
author = "the authors of ganscale"
release = version = __version__

extensions = [
    "ganscale_reference",
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
# Headings down to this level can be linked to, as in `page.md#heading`.
myst_heading_anchors = 3

html_theme = "furo"
html_title = "ganscale"
html_static_path = ["_static"]
html_css_files = ["style.css"]

# Docstrings write `code` with one backtick, which is an emphasis to reStructuredText.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# A reference that leads nowhere is an error (`-n`), but for types of other packages, whose
# documentation is not read while this one is built, for classes that are not public, and for
# aliases that only annotations name.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|pathlib|typing|torch|pydantic|rich|np|numpy|pd|PIL)\..*"),
    (r"py:.*", r"ganscale\.(generation\.(generator|sampler)|metrics\.extractors)\..*"),
    (r"py:.*", r"ganscale\.(models\.classifying|training\.(step_inputs|optimized_model))\..*"),
    (r"py:.*", r"ganscale\.training\.steps\.discriminator\..*"),
    (r"py:.*", r"(Any|Callable|Literal|Mapping|Module|Path|Self|Sequence|Tensor|optional)"),
]
