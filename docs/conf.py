"""Sphinx settings of the documentation site.

The source folder is the repository: pages of deploy/ and the format are read where they are, and links work on the
site as in a checkout. Build: ``make docs``; it executes the notebooks, which import ``demo``.
"""

import os
from pathlib import Path

project = "scalekd-cache"
author = "The scalekd-cache authors"
root_doc = "docs/index"
extensions = ["myst_nb"]
source_suffix = {".md": "myst-nb"}
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
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
nitpicky = True

os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])  # of the kernels, which run in temporary folders
nb_execution_mode = "force"  # always: a cache of outputs would not see changes of the packages
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 180  # seconds per cell
nb_merge_streams = True
nb_output_stderr = "remove"  # tqdm's note about widgets, which has a path of the machine
