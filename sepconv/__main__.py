"""`python -m sepconv`, the same as the command `sepconv`."""

import sys

from sepconv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
