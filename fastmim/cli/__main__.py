"""`python -m fastmim.cli`: the `fastmim` command."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
