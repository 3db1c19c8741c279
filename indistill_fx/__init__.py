"""indistill-fx: a compiler for knowledge distillation.

The public API. Names are loaded on first use, so that `indistill-fx --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

from indistill_fx.version import __version__ as __version__

if TYPE_CHECKING:
    from indistill_fx.compression.compress import compress as compress
    from indistill_fx.curriculum import Curriculum as Curriculum
    from indistill_fx.data.open import open_data as open_data
    from indistill_fx.deploy.check_onnx import check_onnx as check_onnx
    from indistill_fx.deploy.export_onnx import export_onnx as export_onnx
    from indistill_fx.deploy.quantize import quantize_onnx as quantize_onnx
    from indistill_fx.errors import ConfigError as ConfigError
    from indistill_fx.errors import ExportError as ExportError
    from indistill_fx.errors import FrontendError as FrontendError
    from indistill_fx.errors import IndistillError as IndistillError
    from indistill_fx.errors import MatchError as MatchError
    from indistill_fx.errors import PassError as PassError
    from indistill_fx.errors import PruneError as PruneError
    from indistill_fx.errors import TrainError as TrainError
    from indistill_fx.errors import VerifyError as VerifyError
    from indistill_fx.evaluation.accuracy import evaluate as evaluate
    from indistill_fx.graph.view import View as View
    from indistill_fx.losses.task import Task as Task
    from indistill_fx.passes.align import align as align
    from indistill_fx.passes.capture.trace import trace as trace
    from indistill_fx.passes.contract import PassResult as PassResult
    from indistill_fx.passes.ensemble import ensemble as ensemble
    from indistill_fx.passes.extract.instrument import instrument as instrument
    from indistill_fx.passes.pruning.narrow import narrow as narrow
    from indistill_fx.passes.pruning.shrink import shrink as shrink
    from indistill_fx.passes.reuse import reuse_classifier as reuse_classifier
    from indistill_fx.plan import AlignmentPlan as AlignmentPlan
    from indistill_fx.plan import Pair as Pair
    from indistill_fx.runs.load import load as load
    from indistill_fx.stages.compile import compile_stages as compile_stages
    from indistill_fx.stages.stage import Stage as Stage
    from indistill_fx.target import Target as Target
    from indistill_fx.traced import TracedModel as TracedModel
    from indistill_fx.training.chain import distill_chain as distill_chain
    from indistill_fx.training.compare import compare as compare
    from indistill_fx.training.distill import distill as distill
    from indistill_fx.training.save_outputs import save_outputs as save_outputs
    from indistill_fx.training.supervised import train as train

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
    "PassResult": "passes.contract",
    "PruneError": "errors",
    "Stage": "stages.stage",
    "Target": "target",
    "Task": "losses.task",
    "TracedModel": "traced",
    "TrainError": "errors",
    "VerifyError": "errors",
    "View": "graph.view",
    "align": "passes.align",
    "check_onnx": "deploy.check_onnx",
    "compare": "training.compare",
    "compile_stages": "stages.compile",
    "compress": "compression.compress",
    "distill": "training.distill",
    "distill_chain": "training.chain",
    "ensemble": "passes.ensemble",
    "evaluate": "evaluation.accuracy",
    "export_onnx": "deploy.export_onnx",
    "instrument": "passes.extract.instrument",
    "load": "runs.load",
    "narrow": "passes.pruning.narrow",
    "open_data": "data.open",
    "quantize_onnx": "deploy.quantize",
    "reuse_classifier": "passes.reuse",
    "save_outputs": "training.save_outputs",
    "shrink": "passes.pruning.shrink",
    "trace": "passes.capture.trace",
    "train": "training.supervised",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'indistill_fx' has no attribute {name!r}")
    value = getattr(import_module(f"indistill_fx.{_HOMES[name]}"), name)
    if isinstance(value, FunctionType):
        from indistill_fx.system.arguments import checked

        value = checked(value, __name__)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
