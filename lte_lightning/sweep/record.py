"""The record of a point that was started, ``points/NAME.json``."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from lte_lightning.sweep.points import Point, restore


@dataclass(frozen=True)
class Record:
    """The record of a point that was started.

    Args:
        point: The point.
        status: ``running``, ``done``, ``failed``, ``blocked`` or ``stopped``.
        command: The command that began it.
        resumed: Whether it went on from a checkpoint when it was started last.
        began: When it was started last.
        seconds: How long all of its attempts took, but for those that were killed by force.
        code: The exit code of one that failed.
        run: The run folder of one that is done.
        told: The run in MLflow that knows that it is done.
    """

    point: Point
    status: str | None = None
    command: str | None = None
    resumed: bool = False
    began: str | None = None
    seconds: float | None = None
    code: int | None = None
    run: str | None = None
    told: str | None = None

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Record | None":
        """Returns the record that a file holds; None if it holds none."""
        known = {each.name for each in fields(cls)} - {"point"}
        point = restore(content)
        if point is None:
            return None
        return cls(point, **{key: content[key] for key in known & content.keys() if _fits(key, content[key])})

    def content(self) -> dict[str, Any]:
        """Returns the content of the file: the point and its facts."""
        facts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "point"}
        return asdict(self.point) | {key: value for key, value in facts.items() if value is not None}


def _fits(name: str, value: Any) -> bool:
    """Says whether a fact is of its type; a damaged one counts as unknown."""
    if name == "resumed":
        return isinstance(value, bool)
    if name in ("seconds", "code"):
        return type(value) in (int, float) and abs(value) < float("inf")
    return isinstance(value, str)
