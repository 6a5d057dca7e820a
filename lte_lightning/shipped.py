"""The configurations and sweeps that come with the package, by names such as ``lte:quickstart``; and those of runs."""

from pathlib import Path

from lte_lightning.errors import UserError, meant

SCHEME = "lte:"
_PACKAGE = Path(__file__).parent
CONFIGS, SWEEPS = "conf", "sweeps"


def folder(kind: str) -> Path:
    """Returns the folder of the configurations or sweeps: of an installed package, or of a clone beside the package."""
    installed = _PACKAGE / "experiments" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """Returns the names of the configurations or sweeps, sorted; overlays have ``parts`` in theirs."""
    root = folder(kind)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def resolve(word: str, kind: str = CONFIGS) -> str:
    """Turns ``lte:NAME``, or the folder of a run, into the path of a file.

    Args:
        word: ``lte:NAME``, with or without ``.yaml``, or a folder with a ``config.yaml``; anything else comes back
            unchanged.
        kind: `CONFIGS` or `SWEEPS`.

    Raises:
        UserError: There is none of that name, or the folder has no configuration.
    """
    if not word.startswith(SCHEME):
        return _of_run(Path(word)) if kind == CONFIGS and word and Path(word).is_dir() else word
    name = word.removeprefix(SCHEME).removesuffix(".yaml")
    known = names(kind)
    if name not in known:
        # The last part of a name says most: lte:minilm-sst2 for lte:glue/minilm-sst2
        same = [each for each in known if each.rsplit("/", 1)[-1] == name]
        near = meant(same[0] if same else name, known, f"; did you mean {SCHEME}{{}}?")
        raise UserError(f"there is no {SCHEME}{name} in {folder(kind)}{near} (`lte configs` lists them)")
    return str(folder(kind) / f"{name}.yaml")


def _of_run(place: Path) -> str:
    own = [each / "config.yaml" for each in (place, place.parent)]  # RUN/model was made with RUN/config.yaml
    if own[0].is_file():
        return str(own[0])
    near = f"; did you mean {own[1]}?" if own[1].is_file() else "; name a file, or a run's folder"
    raise UserError(f"--config is {place}, a folder without config.yaml{near}")


def resolve_options(words: list[str], options: tuple[str, ...] = ("--config", "-c")) -> list[str]:
    """Returns a command line with the paths of the configurations that it names.

    Args:
        words: Of the command line.
        options: Whose values are looked at.

    Raises:
        UserError: There is none of that name.
    """
    resolved = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if name in options and equals:
            word = f"{name}={resolve(value)}"
        resolved.append(resolve(word) if before in options else word)
    return resolved
