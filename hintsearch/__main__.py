"""Runs the command line: `python -m hintsearch`."""

from .search.command_line import main

if __name__ == "__main__":
    main()
