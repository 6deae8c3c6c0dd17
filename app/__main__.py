"""`python -m app`, the same as `raylway`: also the entrypoint of every Ray Job."""

from app.cli.main import main

if __name__ == "__main__":
    main()
