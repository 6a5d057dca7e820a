"""Points of a sweep that are not done."""

from dataclasses import dataclass

from lte_lightning.sweep.points import Point


@dataclass(frozen=True)
class Missing:
    """A point that is not done.

    Args:
        sweep: Its sweep's name.
        method: Its variant, or its role.
        parameters: Its parameters, in a few words.
        seed: Its seed, if known.
        status: Why it is not done.
    """

    sweep: str
    method: str
    parameters: str
    seed: int | None
    status: str


def missing_point(name: str, point: Point | None, sweep: str, status: str) -> Missing:
    """Describes a missing point, by its name if the sweep has kept nothing else.

    Args:
        name: Name of the point.
        point: The point, if known.
        sweep: Name of the sweep.
        status: Why the point is not done.
    """
    if point is None:
        return Missing(sweep, name, "", None, status)
    values = [f"{key.split('.')[-1]} {value}" for key, value in point.parameters.items()]
    method = point.variant or (point.role if point.role != "point" else "fit")
    return Missing(sweep, method, ", ".join(values), point.seed, status)
