"""The reference that shrunk networks are compared with. The package runs it itself after every shrink, so it lives there."""

from indistill_fx.passes.pruning.masked import Masked, run_masked

__all__ = ["Masked", "run_masked"]
