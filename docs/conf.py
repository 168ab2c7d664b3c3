"""The site's configuration. `make docs` builds the site, without a network."""

import os
import re
from hashlib import sha256
from pathlib import Path
from shutil import copyfile

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from jupyter_cache import get_cache
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.inspect import TypeAliasForwardRef

import tnmoe
from tnmoe.hf.folders.compress import DEFAULT_JOBS
from tnmoe.nn.settings import GROUP_SIZE
from tnmoe.options import MATRICES

HERE = Path(__file__).parent

project = "tnmoe"
author = "The tnmoe authors"
copyright = author  # noqa: A001 - Sphinx requires this name
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
# Every reference to a function, method or attribute must lead somewhere. Types in docstrings are
# prose ("sequence of int") and need not.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:.*", r"(torch|numpy|transformers)\..*")]

# Pages are notebooks. They run again when they or the library change.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
# Tables that cells print as Markdown.
nb_render_markdown_format = "myst"
# A notebook's outputs depend on these files besides its own code.
_scripts = ("benchmarks/*_tables.py", "benchmarks/compression_p*.py", "benchmarks/scaling.py")
_patterns = ("tnmoe/**/*.py", "docs/ipython_*.py", *_scripts)
_results = "benchmarks/results/*/*.json"
_sources = [path for each in (*_patterns, _results) for path in sorted(HERE.parent.glob(each))]
_state = sha256(b"".join(path.read_bytes() for path in _sources)).hexdigest()[:16]
nb_execution_cache_path = str(HERE / "_build" / "runs" / _state)
# The first page makes the folder and its database. Pages run in several processes, of which all but
# one would fail.
get_cache(nb_execution_cache_path).db  # noqa: B018

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The notebooks' kernels start with these files and settings.
_profile = HERE / "_build" / "ipython" / "profile_default"
(_profile / "startup").mkdir(parents=True, exist_ok=True)
copyfile(HERE / "ipython_kernel_config.py", _profile / "ipython_kernel_config.py")
copyfile(HERE / "ipython_startup.py", _profile / "startup" / "ipython_startup.py")
os.environ["IPYTHONDIR"] = str(_profile.parent)
os.environ["PYTHONWARNINGS"] = "ignore"  # warnings would show paths of this machine
os.environ["HF_HUB_OFFLINE"] = "1"
# Pages do not show transformers' hints and progress bars.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# Formulas are MathML, which needs neither a script nor a font from elsewhere.
_SPELLINGS = {r"\dots": r"\ldots", r"\Big(": r"\Bigl(", r"\Big)": r"\Bigr)"}


def _write_formula(translator: nodes.NodeVisitor, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML."""
    tex = node.astext()
    for latex, known in _SPELLINGS.items():
        tex = tex.replace(latex, known)
    translator.body.append(tex2mathml(tex, as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


# An entry of several names with its type, its description, or both.
_SEVERAL_NAMES = re.compile(r"^(\w+(?:, \w+)+)( : .*\n(?: +.*\n)*|\n(?: +.*\n)+)", re.M)


def _prepare_for_napoleon(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Rewrite a docstring so that napoleon understands it."""
    if what in ("attribute", "data", "property"):
        # Napoleon takes the words before a colon in the first line for a type. An empty comment
        # now stands in that line.
        lines[:0] = ["..", ""]
    # Napoleon knows entries of several names among parameters, but not among attributes.
    before, heading, attributes = "\n".join(lines).partition("\nAttributes\n----------\n")
    separate = _SEVERAL_NAMES.sub(
        lambda entry: "".join(field + entry[2] for field in entry[1].split(", ")), attributes
    )
    lines[:] = (before + heading + separate).split("\n")


# Defaults that the code takes from constants.
_CONSTANTS = {"MATRICES": MATRICES, "GROUP_SIZE": GROUP_SIZE, "DEFAULT_JOBS": DEFAULT_JOBS}

# In unions and containers, Sphinx shows the object that stands for an alias of a type.
TypeAliasForwardRef.__repr__ = lambda alias: alias.name


def _clean_signature(  # noqa: PLR0917 - Sphinx passes seven positional arguments
    app: Sphinx, what: str, name: str, obj: object, options: object, text: str | None, result: str
) -> tuple[str, str] | None:
    """Return a signature and its result as the code spells them.

    Sphinx shows three things otherwise. A dataclass's factory becomes an invalid default. A
    protocol's inherited signature says nothing. A constant stands for its value.
    """
    if text is None:
        return None
    written = text.replace("<factory>", "...")
    for constant, value in _CONSTANTS.items():
        written = written.replace(f"= {constant}", f"= {value!r}")
    return "" if text == "(*args, **kwargs)" else written, result


class _TypesAreClasses(SphinxPostTransform):
    """A limit on types: they refer to classes and data, so H in "shape (…, H)" is no attribute."""

    default_priority = 5  # before Sphinx resolves references

    def run(self, **kwargs: object) -> None:
        """Empty the targets of types that name neither a class nor data."""
        domain = self.env.domains.python_domain
        for node in list(self.document.findall(pending_xref)):
            if (node["refdomain"], node["reftype"]) == ("py", "class"):
                place = (self.env, node.get("py:module"), node.get("py:class"), node["reftarget"])
                mode = int(node.hasattr("refspecific"))
                if not any(domain.find_obj(*place, kind, mode) for kind in ("class", "data")):
                    node["reftarget"] = ""  # this leads nowhere


def setup(app: Sphinx) -> None:
    """Register what this file adds to Sphinx."""
    app.add_post_transform(_TypesAreClasses)
    app.connect("autodoc-process-docstring", _prepare_for_napoleon, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _clean_signature)
    app.add_html_math_renderer("mathml", (_write_formula, None), (_write_formula, None))
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as in the docstrings; Sphinx writes Variables


html_math_renderer = "mathml"
