"""Settings of the notebooks' kernels: conf.py puts this file where the kernels look."""

c = get_config()  # noqa: F821 - IPython defines it

# A reader needs the last line of an expected error, not the files in its traceback.
c.InteractiveShell.xmode = "Minimal"

# Pictures are sharp on every screen and the same in every build.
c.InlineBackend.figure_formats = {"svg"}
c.InlineBackend.print_figure_kwargs = {"bbox_inches": "tight", "metadata": {"Date": None}}
c.InlineBackend.rc = {"svg.hashsalt": "tnmoe"}
