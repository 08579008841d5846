"""`python -m metastate` is the command `metastate`."""

import sys

from metastate.cli import main

if __name__ == "__main__":
    sys.exit(main())
