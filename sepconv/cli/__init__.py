"""The command line: `sepconv COMMAND`. `main` runs it, and a file per command does the work."""
