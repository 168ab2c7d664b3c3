"""The site. `make docs` builds it; neither it nor its building needs a network."""

import os
from hashlib import sha256
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import tnmoe

HERE = Path(__file__).parent

project = "tnmoe"
author = "The tnmoe authors"
copyright = author  # noqa: A001 - Sphinx's name
version = release = tnmoe.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tnmoe {release}"
html_show_sourcelink = False

# Reference: signatures from the code, everything else from NumPy-style docstrings.
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "exclude-members": "extra_repr, reset_parameters",
}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Array": "tnmoe.backends.Array"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
# A reference to a function, method or attribute has to lead somewhere. Types in docstrings are
# prose ("sequence of int") and may not.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:.*", r"(torch|numpy|transformers)\..*")]

# Pages are notebooks. They run when they or the library change.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
_library = sha256(b"".join(p.read_bytes() for p in sorted(HERE.parent.glob("tnmoe/**/*.py"))))
nb_execution_cache_path = str(HERE / "_build" / "runs" / _library.hexdigest()[:16])

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# For the notebooks: warnings would show paths, and what was measured on this machine other plans.
os.environ["PYTHONWARNINGS"] = "ignore"
os.environ["TNMOE_CACHE"] = str(HERE / "_build" / "measured")
os.environ["HF_HUB_OFFLINE"] = "1"

# Formulas as MathML: they need neither a script nor a font from elsewhere.
_SPELLINGS = {r"\dots": r"\ldots", r"\Big(": r"\Bigl(", r"\Big)": r"\Bigr)"}


def _formula(translator: nodes.NodeVisitor, node: nodes.math | nodes.math_block) -> None:
    tex = node.astext()
    for ours, theirs in _SPELLINGS.items():
        tex = tex.replace(ours, theirs)
    translator.body.append(tex2mathml(tex, as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def _property(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """In a property's first line napoleon takes what is before a colon for a type; not in ours."""
    if what == "property":
        lines.insert(0, "")


def _signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, text: str | None, result: str
) -> tuple[str, str] | None:
    """Factories of dataclasses are no valid signatures; what protocols inherit says nothing."""
    if text is None:
        return None
    return "" if text == "(*args, **kwargs)" else text.replace("<factory>", "..."), result


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _property, priority=400)
    app.connect("autodoc-process-signature", _signature)
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))


html_math_renderer = "mathml"
