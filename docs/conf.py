"""Sphinx settings of the documentation site.

The source folder is the repository: pages of deploy/ and the format are read where they are, and links work on the
site as in a checkout. Build: ``make docs``.
"""

project = "scalekd-cache"
author = "The scalekd-cache authors"
root_doc = "docs/index"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
include_patterns = [
    "docs/**",
    "deploy/*.md",
    "deploy/*/README.md",
    "feature_store/FORMAT.md",
    "benchmarks/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "build", "demo", "tests"]
myst_heading_anchors = 3
highlight_language = "none"
html_theme = "furo"
html_title = "scalekd-cache"
html_extra_path = ["site"]
html_copy_source = False
html_show_copyright = False
nitpicky = True
