"""Command line: `python -m fvq_jax.evaluate`, see the package."""

import sys

from fvq_jax.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
