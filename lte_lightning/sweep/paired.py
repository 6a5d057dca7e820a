"""Paired differences of methods, with an interval that says whether they are differences at all.

Two things make a figure uncertain: which rows it was measured on, and which seed the model was trained with. The rows'
part comes from the evaluations' draws (`Evaluation.draws`): draw k took the same rows in both, so that what both find
hard cancels. The seeds' part is the spread of the differences over the seeds. The two variances add up, and the
interval is Student's with degrees of freedom after Satterthwaite, "An Approximate Distribution of Estimates of Variance
Components", 1946: of two or three seeds it is as wide as they deserve.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lte_lightning.results import Results, better

ALIKE = 0.03
"""Methods are compared at sparsities that differ by no more than this."""
# Student's t at 97.5 % for 1 to 10 degrees of freedom, then 12, 15, 20, 30 and 60
_T = {
    **dict(enumerate((12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), 1)),
    **{12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.0},
}
_NORMAL = 1.96


@dataclass(frozen=True)
class Difference:
    """What one method's value is above another's.

    Attributes:
        mean: Over the seeds that both have.
        half: Half of the 95 % interval; None of one seed without draws.
        seeds: How many seeds both have.
        rows: Whether the interval has the rows' part.
        higher_is_better: Whether a higher value is better.
    """

    mean: float
    half: float | None
    seeds: int
    rows: bool
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``not told apart`` where 0 lies in the interval, or there is none."""
        if self.half is None or abs(self.mean) <= self.half:
            return "not told apart"
        return "better" if (self.mean > 0) == self.higher_is_better else "worse"

    def text(self, digits: int = 4) -> str:
        """Returns the difference with its interval, what that is of, and the verdict."""
        if self.half is None:
            return f"{self.mean:+z.{digits}f}, one seed: {self.verdict}"
        low, high = self.mean - self.half, self.mean + self.half
        of = "seeds" if not self.rows else "rows alone" if self.seeds == 1 else "rows and seeds"
        return f"{self.mean:+z.{digits}f} ({low:+z.{digits}f} to {high:+z.{digits}f}, {of}): {self.verdict}"


@dataclass(frozen=True)
class Fits:
    """The fits of one method with one setting.

    Attributes:
        method: Its name.
        setting: Its parameters, in a few words.
        by_seed: The results of each seed.
    """

    method: str
    setting: str
    by_seed: Mapping[int, Results]

    @property
    def sparsity(self) -> float:
        """Mean over the seeds; 0 of dense models."""
        return statistics.fmean(results.sparsity or 0.0 for results in self.by_seed.values())

    @property
    def called(self) -> str:
        """Method, setting and sparsity."""
        return f"{' '.join(filter(None, (self.method, self.setting)))} ({100 * self.sparsity:.1f} %)"


def comparisons(fits: Sequence[Fits]) -> Iterator[tuple[Fits, Fits, Difference]]:
    """Yields the first method's settings with those of each other method that may be compared, and the difference.

    These are the setting of the nearest sparsity, if it is near enough, and the dense models that were trained on.

    Args:
        fits: Of one task and metric.
    """
    methods = list(dict.fromkeys(fit.method for fit in fits))
    for ours in (fit for fit in fits if fit.method == methods[0]):
        for method in methods[1:]:
            theirs = min(
                (fit for fit in fits if fit.method == method), key=lambda fit: abs(fit.sparsity - ours.sparsity)
            )
            alike = theirs.sparsity == 0.0 or abs(theirs.sparsity - ours.sparsity) <= ALIKE
            if alike and (difference := paired_difference(ours.by_seed, theirs.by_seed)) is not None:
                yield ours, theirs, difference


def paired_difference(ours: Mapping[int, Results], theirs: Mapping[int, Results]) -> Difference | None:
    """Returns what one method's values are above another's.

    Args:
        ours: Results of the one by seed.
        theirs: Results of the other, of the same metric and the same rows.

    Returns:
        The difference over the seeds that both have; None where they have none in common, or a value is not defined.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    gaps = [
        our_fit.value - their_fit.value
        for our_fit, their_fit in pairs
        if our_fit.value is not None and their_fit.value is not None
    ]
    if not gaps or len(gaps) < len(pairs):
        return None
    variances = []  # with their degrees of freedom
    drawn = [_drawn(our_fit, their_fit) for our_fit, their_fit in pairs]
    rows = [draws for draws in drawn if draws is not None]
    if len(rows) == len(pairs):
        # a draw takes the same rows for every seed, so their mean is one evaluation's
        means = [statistics.fmean(draw) for draw in zip(*rows, strict=False)]
        variances.append((statistics.variance(means), float("inf")))
    if len(gaps) > 1:
        variances.append((statistics.variance(gaps) / len(gaps), len(gaps) - 1.0))
    half = _half(variances) if variances else None
    higher = better(pairs[0][0].metric, 1.0, 0.0)
    return Difference(statistics.fmean(gaps), half, len(gaps), len(rows) == len(pairs), higher)


def _drawn(our_fit: Results, their_fit: Results) -> list[float] | None:
    """The differences of two evaluations' draws; None if one has none, or too few are defined."""
    if not our_fit.draws or not their_fit.draws or len(our_fit.draws) != len(their_fit.draws):
        return None
    gaps = [
        our_draw - their_draw
        for our_draw, their_draw in zip(our_fit.draws, their_fit.draws, strict=True)
        if our_draw is not None and their_draw is not None
    ]
    return gaps if len(gaps) == len(our_fit.draws) else None


def _half(variances: list[tuple[float, float]]) -> float:
    total = sum(variance for variance, _ in variances)
    if total == 0.0:
        return 0.0
    freedom = total**2 / max(sum(variance**2 / degrees for variance, degrees in variances), 1e-300)
    # the next lower entry has the larger t: never too narrow
    listed = [degrees for degrees in _T if degrees <= freedom]
    t = _NORMAL if freedom > 1000 else _T[max(listed, default=1)]
    return t * total**0.5
