"""``python -m fmkernels``: the same as the command ``fmkernels``."""

import sys

from .cli import main

sys.exit(main())
