"""The command line under its short name: ``torchrun -m sst_fast.cli``. It lives in :mod:`sst_fast.train.cli`."""

import sys

from sst_fast.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
