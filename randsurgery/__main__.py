"""``python -m randsurgery`` is the command line."""

from randsurgery.cli.app import main

if __name__ == "__main__":
    main()
