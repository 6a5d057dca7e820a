"""``lte configs``: the configurations and sweeps that come with the package."""

import textwrap
from pathlib import Path

import yaml

from lte_lightning.options import call
from lte_lightning.shipped import CONFIGS, SCHEME, SWEEPS, folder, names, resolve


def main(args: list[str]) -> None:
    """Runs the command; its only word may be a name.

    Raises:
        UserError: If there is no configuration of that name.
    """
    call(configs, "lte configs", ["--name", *args] if args and not args[0].startswith("-") else args)


def configs(name: str | None = None) -> None:
    """Lists the configurations (for --config) and sweeps (for lte sweep) that come with the package.

    Args:
        name: Print this configuration instead, lte:quickstart for example.
    """
    if name:
        return print(Path(resolve(name if name.startswith(SCHEME) else SCHEME + name)).read_text(), end="")
    for kind, title in ((CONFIGS, "lightning fit --config NAME"), (SWEEPS, "lte sweep NAME")):
        print(f"{title}, in {folder(kind)}:")
        for config in names(kind):
            about = _about((folder(kind) / f"{config}.yaml").read_text())
            print(f"  {SCHEME + config:<36} {about}".rstrip())


def _about(text: str) -> str:
    """Returns a file's description: the ``about`` of a sweep, the first comment of a configuration."""
    first = text.partition("\n")[0]
    about = first.removeprefix("#") if first.startswith("#") else str(yaml.safe_load(text).get("about", ""))
    return textwrap.shorten(about, 80, placeholder=" ...")
