"""Up to which sparsity a method loses no more of the dense figure than is tolerated."""

from dataclasses import dataclass, field

from lte_lightning.report.run import Setting

# What a method may lose and still count as good as dense: the paper's of Table 1, and a point elsewhere
TOLERANCES = {"perplexity": 0.5, "rouge": 0.05}
TOLERANCE = 0.01


def tolerance_of(metric: str, tolerance: float | None) -> float:
    """Returns how much of a metric may be lost: what the user says, else what is usual for it."""
    if tolerance is not None:
        return tolerance
    return next((value for name, value in TOLERANCES.items() if metric.lower().startswith(name)), TOLERANCE)


@dataclass
class Tolerated:
    """A method's settings by what they lost of their own seeds' dense figures, each in the order of sparsity.

    Args:
        limit: How much of the metric may be lost.
        within: Those that lost no more than is tolerated, by mean over their seeds.
        beyond: Those that lost more, or whose figure is not defined for a seed.
        unread: Those without a dense figure to be read against.
    """

    limit: float
    within: list[Setting] = field(default_factory=list)
    beyond: list[Setting] = field(default_factory=list)
    unread: list[Setting] = field(default_factory=list)

    @property
    def holds(self) -> list[Setting]:
        """The settings within the tolerance below which all that were measured are within, too."""
        end = min((setting.sparsity for setting in self.beyond), default=1.0)
        return [setting for setting in self.within if setting.sparsity <= end]

    def failing_below(self, sparsity: float) -> list[Setting]:
        """Returns the less sparse settings that lost more."""
        return [setting for setting in self.beyond if setting.sparsity < sparsity]


def tolerated(settings: list[Setting], tolerance: float | None) -> Tolerated:
    """Sorts a method's settings by what they lost."""
    found = Tolerated(tolerance_of(settings[0].metric, tolerance))
    for setting in settings:
        lost = setting.mean("lost")
        is_within = lost is not None and lost <= found.limit + 1e-9
        is_unread = lost is None and not setting.undefined
        (found.within if is_within else found.unread if is_unread else found.beyond).append(setting)
    return found


def percent(settings: list[Setting]) -> str:
    """Writes the sparsities of settings."""
    return " and ".join(dict.fromkeys(f"{100 * setting.sparsity:.0f} %" for setting in settings))
