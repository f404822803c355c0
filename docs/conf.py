# SPDX-License-Identifier: Apache-2.0
"""How the documentation is built: nothing is executed, warnings are errors, no page needs the network."""

import os
import sys
import tomllib
from pathlib import Path

PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
sys.path.insert(0, str(Path(__file__).parent / "_ext"))
(Path(__file__).parent / "_generated").mkdir(exist_ok=True)  # filled by _ext/maxkit_site.py
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the API pages import the package; no chip is needed for that

from notebook_pages import public_repository  # noqa: E402 - out of docs/_ext

project = "maxkit"
author = "the maxkit authors"
copyright = author
release = version = PYPROJECT["project"]["version"]

extensions = [
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "maxkit_site",
]
exclude_patterns = ["_build", "_ext", "_generated"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# Outputs come from tested runs that are committed with the notebooks, never from the build.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # the default loads scripts from elsewhere

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
default_role = "literal"

footer = f"maxkit {version}"
if repository := public_repository():  # versions lie side by side, see publish.py
    footer += ' · <a href="https://{}.github.io/{}/versions.html">other versions</a>'.format(*repository.split("/"))

html_theme = "sphinx_book_theme"
html_title = "maxkit"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static", "_generated"]
html_css_files = ["maxkit.css"]
html_js_files = ["keyboard.js"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "logo": {"image_light": "_static/favicon.svg", "image_dark": "_static/favicon.svg", "text": "maxkit"},
    "footer_content_items": ["copyright", "extra-footer"],
    "extra_footer": footer,
    # Search and the switch of the theme stand in the page's own bars already.
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
html_context = {"default_mode": "auto"}
