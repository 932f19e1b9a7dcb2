"""How `make docs` builds the site. Its source is the whole repository, so that a link from one file
to another works on the site as it does in a checkout; the pages are those in `include_patterns`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# This checkout's packages, for the API reference and for the kernels that execute the lessons.
PATHS = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = [*PATHS, str(ROOT / "docs/_ext")]
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The kernels get an empty IPython profile: no startup files of the user, no warnings.
os.environ["IPYTHONDIR"] = str(ROOT / "docs/_build/ipython")
profile = ROOT / "docs/_build/ipython/profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text("get_config().IPKernelApp.log_level = 'ERROR'\n")

project = "mqa-gpt"
author = "the mqa-gpt authors"
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**.md",
    "kernels/README.md",
    "benchmarks/README.md",
    "mqa_gpt/demo/README.md",
]
exclude_patterns = ["docs/_build", "docs/notebooks", ".*", "build"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "sphinx_copybutton",
    "source_links",
    "mathml",
]

# ------------------------------------------------------------------------ pages and lessons

myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
myst_heading_anchors = 4
# Lessons run in their own folder, where they import `checks`.
nb_execution_mode = "force"
nb_execution_cache_path = str(ROOT / "docs/_build/.jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"

highlight_language = "none"  # of blocks that are only indented

# ----------------------------------------------------------------------------- API reference

default_role = "py:obj"  # a name in backticks is a link where the reference has it
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# -------------------------------------------------------------------------------------- theme

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_dark_style = "github-dark"
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # to the front page, which is in docs/
html_title = "mqa-gpt"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def mark_literal_blocks(app, what, name, obj, options, lines):
    """In a docstring, an indented block after a blank line is code or a table: keep its lines."""
    for i in range(len(lines) - 1, 1, -1):
        before = lines[i - 2]
        if lines[i].startswith("    ") and not lines[i - 1] and before and before[0] != " ":
            lines[i:i] = ["::", ""]


def setup(app):
    """Registers the hook; called by Sphinx."""
    app.connect("autodoc-process-docstring", mark_literal_blocks, priority=400)
