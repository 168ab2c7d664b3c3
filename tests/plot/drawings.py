"""Axes and operators for the tests of pictures, and what stands on the axes."""

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import tnmoe as tn

matplotlib.use("Agg")

SHAPE = tn.MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))


def axes():
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)  # the canvas that a figure has by itself draws nothing
    return figure.subplots()


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]
