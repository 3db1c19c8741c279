"""`python -m indistill_fx`."""

import os
import sys

if sys.path and os.path.abspath(sys.path[0]) == os.getcwd():
    del sys.path[0]  # `python -m` puts the working directory first: a file there must not stand in for a library

from indistill_fx.cli import main

if __name__ == "__main__":
    main()
