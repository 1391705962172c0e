"""Run the command `altgrad` by `python -m altgrad`."""

from altgrad.cli import main

if __name__ == "__main__":
    main()
