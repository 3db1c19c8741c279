"""One honest file of every kind that people save, for `attacks.py`."""

from __future__ import annotations

import argparse
import collections
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from files_made import Make, altered, network, renamed, saved, with_attribute
from torch import nn


def squeezenet() -> dict[str, torch.Tensor]:
    import torchvision

    weights: dict[str, torch.Tensor] = torchvision.models.squeezenet1_1().state_dict()
    return weights


def beside(**more: Any) -> Make:
    return saved(lambda _: {"state_dict": squeezenet(), **more}, beside="torchvision:squeezenet1_1")


class AttributeDict(dict):  # type: ignore[type-arg]
    """As Lightning keeps hyperparameters."""


def honest() -> dict[str, Make]:
    """One honest file of every kind that people save."""
    import timm
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    net, quantise = network, torch.ao.quantization.quantize_dynamic
    optimiser = torch.optim.Adam(net().parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 3)
    made: dict[str, Make] = {
        f"a module, protocol {protocol}": saved(net(), pickle_protocol=protocol) for protocol in (2, 3, 4, 5)
    }
    things: dict[str, Any] = {
        "Namespace": argparse.Namespace(lr=0.1), "AttributeDict": AttributeDict(lr=0.1),
        "a path": Path("a"), "numpy float": np.float64(1),
        "numpy array": np.ones(3), "numpy state": np.random.get_state(), "random state": torch.get_rng_state(),
        "device": torch.device("cuda:0"),
        "defaultdict": collections.defaultdict(list, a=[1]), "optimiser": optimiser.state_dict(), "optimiser itself": optimiser,
        "schedule": schedule.state_dict(), "schedule itself": schedule, "date": datetime.now(UTC), "dtype": torch.float16, "a class": dict,
        "set": {1, 2}, "frozenset": frozenset((1, 2)), "complex": 1 + 2j, "range": range(3), "large number": 10**30, "bytes": b"x",
        "Counter": collections.Counter("ab"), "module": net(), "nested": {"a": [{"b": (1, None, True)}]},
    }  # fmt: skip
    made |= {f"{name} beside weights": beside(thing=thing) for name, thing in things.items()}
    spec = "torchvision:squeezenet1_1"
    for key in ("state_dict", "model_state_dict", "model", "net", "module"):
        made[f"weights under {key}"] = saved(lambda _, key=key: {key: squeezenet()}, beside=spec)
    made |= {
        "weights": saved(lambda _: squeezenet(), beside=spec),
        "weights before 1.6": saved(lambda _: squeezenet(), beside=spec, _use_new_zipfile_serialization=False),
        "weights of DataParallel": saved(lambda _: {f"module.{k}": v for k, v in squeezenet().items()}, beside=spec),
        "weights of torch.compile": saved(
            lambda _: {f"_orig_mod.{k}": v for k, v in squeezenet().items()}, beside=spec
        ),
        "DataParallel": saved(nn.DataParallel(net())),
        "AveragedModel": saved(torch.optim.swa_utils.AveragedModel(net())),
        "a model in a checkpoint": saved({"model": net(), "optimizer": optimiser, "args": argparse.Namespace()}),
        "hyphens in names": saved(renamed("_modules", "block4-0")),
        "a keyword as name": saved(renamed("_modules", "class")),
        "a sparse buffer": saved(with_attribute("mask", torch.eye(3).to_sparse())),
        "a sparse buffer, CSR": saved(with_attribute("mask", torch.eye(3).to_sparse_csr())),
        "quantised tensor": saved(with_attribute("q", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))),
        "a traced module": saved(torch.fx.symbolic_trace(net())),
        "torchvision's feature extractor": saved(
            lambda _: create_feature_extractor(torchvision.models.shufflenet_v2_x0_5(), {"stage2": "a", "stage4": "b"})
        ),
        "features_only": saved(timm.create_model("resnet10t", features_only=True)),
        "an exported program": altered(lambda _: None, program=True),
        "a program on cuda": altered(
            lambda entries: entries.update(
                {
                    name: data.replace(b'"cpu"', b'"cuda"')
                    for name, data in entries.items()
                    if name.endswith("weights_config.json")
                }
            ),
            program=True,
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made["quantised linear layers"] = saved(quantise(net()))
        recurrent = saved(quantise(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM}))
        made["quantised recurrent layers"] = lambda folder: [
            "load",
            recurrent(folder)[1],
        ]  # it gives no one tensor to inspect
    return made
