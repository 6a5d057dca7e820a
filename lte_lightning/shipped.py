"""The configurations and sweeps that come with the package, by names such as ``lte:quickstart``."""

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
    """Turns ``lte:NAME`` into the path of a file.

    Args:
        word: ``lte:NAME``, with or without ``.yaml``; anything else comes back unchanged.
        kind: `CONFIGS` or `SWEEPS`.

    Raises:
        UserError: There is none of that name.
    """
    if not word.startswith(SCHEME):
        return word
    name = word.removeprefix(SCHEME).removesuffix(".yaml")
    known = names(kind)
    if name not in known:
        # The last part of a name says most: lte:minilm-sst2 for lte:glue/minilm-sst2
        same = [each for each in known if each.rsplit("/", 1)[-1] == name]
        near = meant(same[0] if same else name, known, f"; did you mean {SCHEME}{{}}?")
        raise UserError(f"there is no {SCHEME}{name} in {folder(kind)}{near} (`lte configs` lists them)")
    return str(folder(kind) / f"{name}.yaml")


def resolve_options(words: list[str], option: str = "--config") -> list[str]:
    """Returns a command line with the paths of the configurations that it names.

    Args:
        words: Of the command line.
        option: Whose values are looked at.

    Raises:
        UserError: There is none of that name.
    """
    resolved = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if name == option and equals:
            word = f"{name}={resolve(value)}"
        resolved.append(resolve(word) if before == option else word)
    return resolved
