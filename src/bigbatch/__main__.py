"""``python -m bigbatch``: the command line without the ``bigbatch`` script."""

from bigbatch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
