"""Percentiles, and the confidence interval of a ratio of medians over paired samples."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence

RESAMPLES = 10_000


def percentile(values: Sequence[float], share: float) -> float:
    """The value at `share` (0 to 1) of the sorted values, linear between neighbours; NaN of nothing."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    below = int(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (place - below)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """P50 of `a` over P50 of `b` on the rounds that have both, or the P50 of the rounds' ratios.

    `ci95` is the 95 % interval of the paired bootstrap.
    """

    a: str
    b: str
    p50_ratio: float
    ci95: tuple[float, float]
    pairs: int

    def significant(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.ci95[0] <= 1 <= self.ci95[1]


def compare(names: tuple[str, str], pairs: Sequence[tuple[float, float]], seed: int) -> Comparison:
    """Resamples whole rounds, so that what slows both arms of a round does not widen the interval."""
    if not pairs:
        return Comparison(*names, float("nan"), (float("nan"), float("nan")), 0)
    rng = random.Random(seed)
    ratios = [_ratio(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES)]
    interval = (percentile(ratios, 0.025), percentile(ratios, 0.975))
    return Comparison(*names, _ratio(pairs), interval, len(pairs))


def compare_pairwise(names: tuple[str, str], pairs: Sequence[tuple[float, float]], seed: int) -> Comparison:
    """The same with the P50 of the rounds' ratios: for rounds that differ more from each other than within."""
    ratios = [(a / b, 1.0) for a, b in pairs]
    return compare(names, ratios, seed)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
