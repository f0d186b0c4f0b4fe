"""`python -m metarun` is the `metarun` command."""

from metarun.cli.main import entry

if __name__ == "__main__":
    entry()
