"""The sparsity up to which a method loses no more than a tolerance against dense."""

from dataclasses import dataclass, field

from lte_lightning.report.run import Setting

# Loss at which a method still counts as good as dense: the paper's in Table 1, and one point for other metrics
TOLERANCES = {"perplexity": 0.5, "rouge": 0.05}
TOLERANCE = 0.01


def tolerance_of(metric: str, tolerance: float | None) -> float:
    """Returns the tolerated loss of a metric: the user's, else the metric's usual tolerance."""
    if tolerance is not None:
        return tolerance
    return next((value for name, value in TOLERANCES.items() if metric.lower().startswith(name)), TOLERANCE)


@dataclass
class Tolerated:
    """A method's settings, sorted by their loss against their own seeds' dense values, each in the order of sparsity.

    Args:
        limit: The tolerated loss.
        within: Settings that lost no more, by the mean over their seeds.
        beyond: Settings that lost more, or whose value is undefined for a seed.
        unread: Settings without a dense value to compare with.
    """

    limit: float
    within: list[Setting] = field(default_factory=list)
    beyond: list[Setting] = field(default_factory=list)
    unread: list[Setting] = field(default_factory=list)

    @property
    def holds(self) -> list[Setting]:
        """The settings within the tolerance such that every less sparse setting is within it, too."""
        end = min((setting.sparsity for setting in self.beyond), default=1.0)
        return [setting for setting in self.within if setting.sparsity <= end]

    def failing_below(self, sparsity: float) -> list[Setting]:
        """Returns the less sparse settings that lost more."""
        return [setting for setting in self.beyond if setting.sparsity < sparsity]


def tolerated(settings: list[Setting], tolerance: float | None) -> Tolerated:
    """Sorts a method's settings by their loss."""
    by_loss = Tolerated(tolerance_of(settings[0].metric, tolerance))
    for setting in settings:
        lost = setting.mean("lost")
        is_within = lost is not None and lost <= by_loss.limit + 1e-9
        is_unread = lost is None and not setting.undefined
        (by_loss.within if is_within else by_loss.unread if is_unread else by_loss.beyond).append(setting)
    return by_loss


def percent(settings: list[Setting]) -> str:
    """Returns the sparsities of settings as text."""
    return " and ".join(dict.fromkeys(f"{100 * setting.sparsity:.0f} %" for setting in settings))
