"""The site. `make docs` builds it; neither it nor its building needs a network."""

import os
import re
from hashlib import sha256
from pathlib import Path
from shutil import copyfile

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.transforms.post_transforms import SphinxPostTransform

import tnmoe
from tnmoe.options import MATRICES

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
html_static_path = ["_static"]
html_css_files = ["tnmoe.css"]
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
# What a notebook's outputs depend on besides its own code.
_sources = [*sorted(HERE.parent.glob("tnmoe/**/*.py")), *sorted(HERE.glob("ipython_*.py"))]
_state = sha256(b"".join(path.read_bytes() for path in _sources)).hexdigest()[:16]
nb_execution_cache_path = str(HERE / "_build" / "runs" / _state)

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# What the notebooks' kernels start with.
_profile = HERE / "_build" / "ipython" / "profile_default"
(_profile / "startup").mkdir(parents=True, exist_ok=True)
copyfile(HERE / "ipython_kernel_config.py", _profile / "ipython_kernel_config.py")
copyfile(HERE / "ipython_startup.py", _profile / "startup" / "ipython_startup.py")
os.environ["IPYTHONDIR"] = str(_profile.parent)
os.environ["PYTHONWARNINGS"] = "ignore"  # warnings would show paths of this machine
os.environ["HF_HUB_OFFLINE"] = "1"
# transformers' hints and progress bars are no part of a page.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# Formulas as MathML: they need neither a script nor a font from elsewhere.
_SPELLINGS = {r"\dots": r"\ldots", r"\Big(": r"\Bigl(", r"\Big)": r"\Bigr)"}


def _formula(translator: nodes.NodeVisitor, node: nodes.math | nodes.math_block) -> None:
    tex = node.astext()
    for ours, theirs in _SPELLINGS.items():
        tex = tex.replace(ours, theirs)
    translator.body.append(tex2mathml(tex, as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


# An entry of several names, and its type, its description, or both.
_SEVERAL = re.compile(r"^(\w+(?:, \w+)+)( : .*\n(?: +.*\n)*|\n(?: +.*\n)+)", re.M)


def _for_napoleon(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Write a docstring so that napoleon understands it."""
    if what in ("attribute", "data", "property"):
        # What their first line has before a colon it takes for a type: now that is a comment.
        lines[:0] = ["..", ""]
    # It knows entries of several names for parameters, and not for attributes.
    before, heading, attributes = "\n".join(lines).partition("\nAttributes\n----------\n")
    each = _SEVERAL.sub(
        lambda entry: "".join(one + entry[2] for one in entry[1].split(", ")), attributes
    )
    lines[:] = (before + heading + each).split("\n")


_ALIAS = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")


def _signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, text: str | None, result: str
) -> tuple[str, str] | None:
    """Signatures as they are written in the code.

    Factories of dataclasses are no valid signatures, what protocols inherit says nothing, and in
    unions Sphinx leaves the object that stands for an alias.
    """
    if text is None:
        return None
    written = _ALIAS.sub(r"\1", text).replace("<factory>", "...")
    written = written.replace("= MATRICES", f"= {MATRICES!r}")
    return "" if text == "(*args, **kwargs)" else written, result and _ALIAS.sub(r"\1", result)


class _TypesAreClasses(SphinxPostTransform):
    """Words of types, as H in "shape (…, H)", are no references to attributes of these names."""

    default_priority = 5  # before references are resolved

    def run(self, **kwargs: object) -> None:
        domain = self.env.domains.python_domain
        for node in list(self.document.findall(pending_xref)):
            if (node["refdomain"], node["reftype"]) == ("py", "class"):
                place = (self.env, node.get("py:module"), node.get("py:class"), node["reftarget"])
                mode = int(node.hasattr("refspecific"))
                if not any(domain.find_obj(*place, kind, mode) for kind in ("class", "data")):
                    node["reftarget"] = ""  # leads nowhere


def setup(app: Sphinx) -> None:
    app.add_post_transform(_TypesAreClasses)
    app.connect("autodoc-process-docstring", _for_napoleon, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _signature)
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as in the docstrings; Sphinx says Variables


html_math_renderer = "mathml"
