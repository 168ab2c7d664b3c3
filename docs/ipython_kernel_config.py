"""What the notebooks of the site run with: conf.py puts it where their kernels look for it."""

c = get_config()  # noqa: F821 - of IPython

# Of an expected error a reader needs its last line, not the files that it went through.
c.InteractiveShell.xmode = "Minimal"

# Sharp on every screen, and the same in every build.
c.InlineBackend.figure_formats = {"svg"}
c.InlineBackend.print_figure_kwargs = {"bbox_inches": "tight", "metadata": {"Date": None}}
c.InlineBackend.rc = {"svg.hashsalt": "tnmoe"}
