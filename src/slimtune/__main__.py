"""``python -m slimtune``."""

from slimtune.cli import main

if __name__ == "__main__":
    main()
