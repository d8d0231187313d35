"""`python -m cliptune_server` is `cliptune serve`."""

import sys

from cliptune.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
