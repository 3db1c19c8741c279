"""`python -m indistill_fx`."""

from indistill_fx.cli import main

if __name__ == "__main__":
    main()
