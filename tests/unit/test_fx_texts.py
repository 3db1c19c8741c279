"""fx keeps the text of every graph; those of graphs that are gone are let go of."""

from __future__ import annotations

import gc
import inspect
import linecache

import torch
from torch import fx, nn

from indistill_fx.graph.edit import forget_sources

TEXTS = fx.graph_module._loader.eval_cache


def name(graph: fx.GraphModule) -> str:
    return type(graph).forward.__code__.co_filename


def test_texts_of_living_graphs_stay_and_those_of_dead_ones_go():
    alive, dead = (fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) for _ in range(2))
    names = name(alive), name(dead)
    assert all(key in TEXTS for key in names)
    before = len(TEXTS)
    forget_sources(most=before)
    assert len(TEXTS) == before  # not more than so many
    del dead
    gc.collect()
    forget_sources(most=0)
    assert names[0] in TEXTS and names[1] not in TEXTS and names[1] not in linecache.cache
    assert "def forward" in inspect.getsource(type(alive).forward)
    alive(torch.zeros(1, 2))


def test_texts_of_a_graphs_earlier_versions_go():
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    first = name(graph)
    graph.recompile()
    assert name(graph) != first
    forget_sources(most=0)
    assert first not in TEXTS and name(graph) in TEXTS
