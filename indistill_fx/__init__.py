"""indistill-fx: a compiler for knowledge distillation.

The public API. Names are loaded on first use, so that `indistill-fx --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from indistill_fx.curriculum import Curriculum as Curriculum
    from indistill_fx.errors import ConfigError as ConfigError
    from indistill_fx.errors import ExportError as ExportError
    from indistill_fx.errors import FrontendError as FrontendError
    from indistill_fx.errors import IndistillError as IndistillError
    from indistill_fx.errors import MatchError as MatchError
    from indistill_fx.errors import PassError as PassError
    from indistill_fx.errors import PruneError as PruneError
    from indistill_fx.errors import TrainError as TrainError
    from indistill_fx.errors import VerifyError as VerifyError
    from indistill_fx.export import export_onnx as export_onnx
    from indistill_fx.passes.instrument import instrument as instrument
    from indistill_fx.passes.narrow import narrow as narrow
    from indistill_fx.passes.pipeline import align as align
    from indistill_fx.passes.shrink import shrink as shrink
    from indistill_fx.passes.trace import trace as trace
    from indistill_fx.plan import AlignmentPlan as AlignmentPlan
    from indistill_fx.plan import Pair as Pair
    from indistill_fx.result import PassResult as PassResult
    from indistill_fx.sources import load as load
    from indistill_fx.stage import Stage as Stage
    from indistill_fx.stage import compile_stages as compile_stages
    from indistill_fx.traced import TracedModel as TracedModel
    from indistill_fx.train import distill as distill

_HOMES: dict[str, str] = {
    "AlignmentPlan": "plan",
    "ConfigError": "errors",
    "Curriculum": "curriculum",
    "ExportError": "errors",
    "FrontendError": "errors",
    "IndistillError": "errors",
    "MatchError": "errors",
    "Pair": "plan",
    "PassError": "errors",
    "PassResult": "result",
    "PruneError": "errors",
    "Stage": "stage",
    "TracedModel": "traced",
    "TrainError": "errors",
    "VerifyError": "errors",
    "align": "passes.pipeline",
    "compile_stages": "stage",
    "distill": "train",
    "export_onnx": "export",
    "instrument": "passes.instrument",
    "load": "sources",
    "narrow": "passes.narrow",
    "shrink": "passes.shrink",
    "trace": "passes.trace",
}

__all__ = sorted([*_HOMES, "__version__"])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'indistill_fx' has no attribute {name!r}")
    value = getattr(import_module(f"indistill_fx.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
