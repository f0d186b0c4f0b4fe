"""Entry point of `python -m metarun`, the same program as the `metarun` command."""

import os
import sys

if __name__ == "__main__":
    # Python searches modules in the current folder first, which may come from somebody else. Those
    # of the user are found there all the same; see `config/trust.py`.
    if sys.path[:1] == [os.getcwd()]:  # noqa: PTH109 - pathlib might be found there
        del sys.path[0]
    from metarun.cli.main import entry

    entry()
