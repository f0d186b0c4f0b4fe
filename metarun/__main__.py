"""Entry point of `python -m metarun`, the same program as the `metarun` command."""

from metarun.cli.main import entry

if __name__ == "__main__":
    entry()
