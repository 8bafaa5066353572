"""A cost in measured time: how long samples take as a linear and quadratic function of their length."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class TimeCost:
    """Seconds of samples by length: `linear * n + quadratic * n ** 2`; a cost for `StepLoader`."""

    linear: float
    quadratic: float

    def __call__(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """int [n] -> float64 [n]."""
        lengths = np.asarray(tokens, dtype=np.float64)
        return self.linear * lengths + self.quadratic * lengths**2


def fit_cost(lengths: ArrayLike, seconds: ArrayLike) -> TimeCost:
    """The TimeCost with the least squared relative error, its coefficients at least 0.

    lengths: int [k], of one sample.  seconds: float [k], its time.  ValueError without two lengths or with times that
    are not positive.
    """
    n, t = np.asarray(lengths, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(np.unique(n)) < 2 or not (t > 0).all() or not (n > 0).all():
        raise ValueError(f"a cost is fitted to positive times of at least two lengths; got {t} s for lengths {n}")
    terms = np.stack([n / t, n**2 / t], axis=1)
    candidates = [np.linalg.lstsq(terms, np.ones_like(t), rcond=None)[0]]
    # Where a coefficient would be negative the best one without it lies on the border.
    for kept in (0, 1):
        alone = np.zeros(2)
        alone[kept] = terms[:, kept].sum() / (terms[:, kept] ** 2).sum()
        candidates.append(alone)
    allowed = [pair for pair in candidates if (pair >= 0).all()]
    best = min(allowed, key=lambda pair: float(((terms @ pair - 1) ** 2).sum()))
    return TimeCost(float(best[0]), float(best[1]))


def calibrate(run: Callable[[int], int], lengths: Sequence[int], repeats: int = 3) -> TimeCost:
    """Measure what samples of some lengths take, interleaved, and fit their cost.

    run: computes some samples of a length and returns their number; it ends when the work is done.
    """
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    for length in lengths:
        run(length)  # compilations, allocations
    for _ in range(repeats):
        for length in lengths:
            began = time.perf_counter()
            samples = run(length)
            seconds[length].append((time.perf_counter() - began) / samples)
    return fit_cost(lengths, [statistics.median(seconds[length]) for length in lengths])
