"""Points of a sweep that are not done."""

from dataclasses import dataclass

from lte_lightning.sweep.points import Point


@dataclass(frozen=True)
class Missing:
    """A point that is not done.

    Args:
        sweep: Its sweep's name.
        method: Its variant, or what it is to others.
        parameters: Its parameters, in a few words.
        seed: Its seed, if known.
        status: What became of it.
    """

    sweep: str
    method: str
    parameters: str
    seed: int | None
    status: str


def missing_point(name: str, point: Point | None, sweep: str, status: str) -> Missing:
    """Describes a missing point. If nothing else is known of it, its name does.

    Args:
        name: The point's.
        point: The point, if it is known.
        sweep: The sweep's name.
        status: What became of the point.
    """
    if point is None:
        return Missing(sweep, name, "", None, status)
    values = [f"{key.split('.')[-1]} {value}" for key, value in point.parameters.items()]
    method = point.variant or (point.role if point.role != "point" else "fit")
    return Missing(sweep, method, ", ".join(values), point.seed, status)
