"""The plot of a dataset card: how many users have how many events."""

from pathlib import Path

import numpy as np
from grzoo.data.jagged import Int64

PLOT_FILE = "lengths.png"


def plot_lengths(lengths: Int64, path: Path) -> bool:
    """Write a histogram of events per user (int [users]) as PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3))
    axes = figure.add_axes((0.13, 0.17, 0.84, 0.79))
    axes.stairs(*np.histogram(lengths, bins=_bins(int(lengths.max()))), fill=True)
    axes.set_xscale("log")
    for name, value, line in (("mean", lengths.mean(), "--"), ("p99", np.percentile(lengths, 99), ":")):
        axes.axvline(float(value), color="black", linestyle=line, label=f"{name} {value:,.0f}")
    axes.set_xlabel("events per user")
    axes.set_ylabel("users")
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(path)
    return True


def _bins(longest: int) -> Int64:
    """Edges of bins that grow by about a tenth, at least one event wide."""
    return np.unique(np.round(np.geomspace(1, longest + 1, 60)).astype(np.int64))
