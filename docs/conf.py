"""Sphinx settings: ``sphinx-build -W docs FOLDER``."""

from runner import __version__

project = "hydra-runner"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
html_theme = "furo"
html_show_copyright = False
exclude_patterns = ["recipes/*.md", "*_template.md"]  # those of the forge
myst_heading_anchors = 3
