"""The plot of the balancing benchmark."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def plot(
    panels: Mapping[str, Sequence[NDArray[np.float64]]], contestants: Sequence[str], steps: str, path: Path
) -> None:
    """Write a PNG of the cost of every rank over the steps; a message instead where matplotlib is not installed.

    panels: title -> for each of the `contestants` float [steps, ranks], cost over the mean.  steps: label of the axis.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'grzoo[plots]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape, size = (len(panels), len(contestants)), (4.5 * len(contestants), 2.4 * len(panels))
    figure, grid = pyplot.subplots(
        *shape, figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )  # fmt: skip
    for line, (title, each) in zip(grid, panels.items(), strict=True):
        for axes, contestant, costs in zip(line, contestants, each, strict=True):
            number = np.arange(len(costs))
            axes.plot(np.repeat(number, costs.shape[1]), costs.ravel(), ".", markersize=2, alpha=0.4)
            axes.plot(number, costs.max(axis=1), color="black", linewidth=1, label="slowest rank")
            axes.set_title(f"{title}: {contestant}", fontsize=9)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("cost / mean")
    for axes in grid[-1]:
        axes.set_xlabel(steps)
    grid[0, 0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
