"""Configuration of Sphinx: ``make docs`` builds the pages of this folder into ``docs/_build``."""

import sys
from pathlib import Path

import sb3_mpg

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sb3-mpg"
author = "sb3-mpg contributors"
project_copyright = author
release = version = sb3_mpg.__version__

extensions = [
    "generated_pages",
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Markdown: formulas between dollars, and a link target for each heading of the first four levels
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# Reference: in the order of the source, types beside the descriptions of the parameters
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 100
python_use_unqualified_type_names = True

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = f"sb3-mpg {release}"
html_theme_options = {"navigation_with_keys": True}
# Prompts are no part of a command
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
