"""`python -m engram_lm` is `engram`."""

import sys

from engram_lm.cli import main

if __name__ == "__main__":
    sys.exit(main())
