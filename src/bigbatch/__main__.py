"""``python -m bigbatch``: the command line, where the ``bigbatch`` script is not on the path."""

from bigbatch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
