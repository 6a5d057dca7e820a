"""``python -m lte_lightning.bench``."""

import sys

from lte_lightning.bench import main

sys.exit(main())
