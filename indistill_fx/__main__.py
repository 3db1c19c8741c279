"""The `indistill-fx` command, also as `python -m indistill_fx`."""

import os
import sys
import sysconfig

if os.getcwd() not in map(os.path.abspath, sysconfig.get_paths().values()):
    # `python -m`, and a relative entry of PYTHONPATH, put the working directory before the libraries; a file there must not shadow one.
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != os.getcwd()]

from indistill_fx.cli import main

if __name__ == "__main__":
    main()
