"""`python -m interp.cli`: the command `interp`, for launchers that start Python themselves."""

from interp.cli import main

if __name__ == "__main__":
    main()
