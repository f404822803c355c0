# SPDX-License-Identifier: Apache-2.0
"""How the documentation is built: nothing is executed, warnings are errors, no page needs the network."""

import tomllib
from pathlib import Path

PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())

project = "maxkit"
author = "the maxkit authors"
copyright = author
release = version = PYPROJECT["project"]["version"]

extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Outputs come from tested runs that are committed with the notebooks, never from the build.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # the default loads scripts from elsewhere

html_theme = "sphinx_book_theme"
html_title = "maxkit"
html_copy_source = False
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False}
