"""`python -m supar_sweep` is the `supar-sweep` command."""

import sys

from supar_sweep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
