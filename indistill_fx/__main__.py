"""`python -m indistill_fx`."""

import os
import sys

if sys.path and os.path.abspath(sys.path[0]) == os.getcwd():
    # `python -m` puts the working directory first on the path; a file there must not shadow a library.
    del sys.path[0]

from indistill_fx.cli import main

if __name__ == "__main__":
    main()
