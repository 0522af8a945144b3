"""``python -m lisa_dist COMMAND``, also what torchrun starts in every rank."""

import sys

from lisa_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
