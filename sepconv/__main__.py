"""`python -m sepconv`, the same as the command `sepconv`."""

from sepconv.cli import main

main()
