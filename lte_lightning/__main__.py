"""``python -m lte_lightning`` is the ``lightning`` command."""

from lte_lightning.cli import main

main()
