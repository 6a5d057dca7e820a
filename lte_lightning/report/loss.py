"""What a method lost of the dense figure, paired by seed, and up to which sparsity that is tolerated."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from lte_lightning.report.material import Material, Setting
from lte_lightning.sweep.table import mean_text, span_text

# What a method may lose and still count as good as dense: the paper's of Table 1, and a point elsewhere
TOLERANCES = {"perplexity": 0.5, "rouge": 0.05}
TOLERANCE = 0.01


def tolerance_of(metric: str, given: float | None) -> float:
    """Returns how much of a metric may be lost."""
    if given is not None:
        return given
    return next((value for name, value in TOLERANCES.items() if metric.lower().startswith(name)), TOLERANCE)


@dataclass
class Tolerated:
    """A method's settings by what they lost, each in the order of sparsity.

    Args:
        within: Those that lost no more than is tolerated, by mean over their seeds.
        beyond: Those that lost more, or whose figure is not defined for a seed.
        unread: Those without a dense figure to be read against.
    """

    within: list[Setting] = field(default_factory=list)
    beyond: list[Setting] = field(default_factory=list)
    unread: list[Setting] = field(default_factory=list)

    @property
    def sparsest(self) -> Setting | None:
        """The sparsest setting below which all that were measured are within, too."""
        end = min((setting.sparsity for setting in self.beyond), default=1.0)
        holding = [setting for setting in self.within if setting.sparsity <= end]
        return max(holding, key=lambda setting: setting.sparsity, default=None)

    def failing_below(self, sparsity: float) -> list[Setting]:
        """Returns the less sparse settings that lost more."""
        return [setting for setting in self.beyond if setting.sparsity < sparsity]


def tolerated(material: Material, task: str, method: str, tolerance: float | None) -> Tolerated:
    """Sorts a method's settings by what they lost of their own seeds' dense figures."""
    dense, limit, found = material.dense(task), tolerance_of(material.tasks[task], tolerance), Tolerated()
    for setting in material.settings(task):
        if setting.method == method:
            lost = setting.lost(dense)
            if setting.undefined:
                found.beyond.append(setting)
            elif not lost:
                found.unread.append(setting)
            else:
                (found.within if statistics.fmean(lost) <= limit + 1e-9 else found.beyond).append(setting)
    return found


def percent(settings: Sequence[Setting]) -> str:
    """Writes the sparsities of settings."""
    return " and ".join(dict.fromkeys(f"{100 * setting.sparsity:.0f} %" for setting in settings))


def figure_text(setting: Setting) -> str:
    """Writes a setting's figure; one that is not defined is said to be so."""
    if not setting.undefined:
        return mean_text(setting.values("value"))
    if len(setting.undefined) == len(setting.runs):
        return "undefined"
    values = [run.results.value for run in setting.runs]
    return f"{mean_text(values)} (undefined: seed {', '.join(map(str, setting.undefined))})"


def kept_text(setting: Setting) -> str:
    """Writes what a setting keeps of the span from floor to dense."""
    return span_text([run.span_kept for run in setting.runs])


def sentence(material: Material, task: str, method: str, tolerance: float | None) -> str | None:
    """Says up to which sparsity a method loses no more than is tolerated; None without a dense figure."""
    found, limit = tolerated(material, task, method, tolerance), tolerance_of(material.tasks[task], tolerance)
    if not found.within and not found.beyond:
        return None
    metric, best = material.tasks[task], found.sparsest
    method = (found.within + found.beyond)[0].called
    undefined = [setting for setting in found.beyond if setting.undefined]
    if not found.within:
        if len(undefined) == len(found.beyond):
            return f"{task}: {method} has an undefined {metric} at every setting that was run."
        also = f" ({metric} undefined at {percent(undefined)})" if undefined else ""
        return f"{task}: {method} loses more than {limit:g} at every setting that was run{also}."
    if best is None:
        best = found.within[-1]
        where = f"at {100 * best.sparsity:.0f} % FFN sparsity, though more at "
        where += percent(found.failing_below(best.sparsity))
    else:
        where = f"up to {100 * best.sparsity:.0f} % FFN sparsity"
    span = f" and keeps {kept_text(best)} of the span from floor to dense" if best.values("span_kept") else ""
    later = [setting for setting in found.within if setting.sparsity > best.sparsity]
    also = f"; at {percent(later)} too, though not in between" if later else ""
    return f"{task}: {method} loses at most {limit:g} {where} ({metric} {figure_text(best)}){span}{also}."
