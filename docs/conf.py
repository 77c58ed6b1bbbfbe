"""Sphinx configuration: `make docs` builds the site in docs/_build/html."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

package = {}
exec((ROOT / 'mmevm' / 'version.py').read_text(), package)

project = 'mmevm'
author = 'mmevm contributors'
version = release = package['__version__']

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton']
exclude_patterns = ['_build', 'benchmarks']

myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False

html_theme = 'furo'
html_title = f'mmevm {release}'
copybutton_exclude = '.linenos, .gp, .go'
