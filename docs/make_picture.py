"""Draw the picture that README and the site begin with: eight experts that share a central core.

``python docs/make_picture.py`` writes ``docs/_static/experts.svg``; a given matplotlib always
writes the same bytes.
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

import tnmoe as tn
from tnmoe import plot

TARGET = Path(__file__).parent / "_static/experts.svg"
# The first matrix of a feed-forward network in BERT base and GPT-2.
SHAPE = tn.MPOShape(out_dims=(4, 4, 8, 6, 4), in_dims=(3, 4, 4, 4, 4))
EXPERTS = 8
# Inches. The white ground keeps black lines readable on dark pages.
SIZE, GROUND = (7.2, 3.3), "white"


def draw(target: Path) -> None:
    """Draw the picture into a file."""
    experts = tn.SharedMPO.replicate(tn.MPO.random(SHAPE, rng=0), EXPERTS)
    figure = Figure(figsize=SIZE, layout="constrained", facecolor=GROUND)
    ax = plot.network(experts, figure.subplots())
    dense = EXPERTS * SHAPE.out_features * SHAPE.in_features
    ax.set_title(f"{ax.get_title()}, where dense experts have {dense:,}", fontsize="medium")
    # Without a salt and without a date, every run would write another file.
    with matplotlib.rc_context({"svg.hashsalt": target.stem}):
        figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(TARGET)
