"""`python -m altgrad` is the command `altgrad`."""

from altgrad.cli import main

if __name__ == "__main__":
    main()
