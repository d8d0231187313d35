"""`python -m cliptune_server` is `cliptune serve`."""

import argparse
import sys

from cliptune.errors import CliptuneError

from cliptune_server.cli import serve


def main() -> int:
    """Exit status of the daemon; 1 when it could not start."""
    parser = argparse.ArgumentParser(prog="python -m cliptune_server", description=serve.summary)
    serve.add_arguments(parser)
    try:
        return serve.run(parser.parse_args())
    except CliptuneError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
