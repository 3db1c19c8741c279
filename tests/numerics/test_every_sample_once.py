"""Two processes under torchrun see every sample once between them, whatever shares the samples out and whatever a batch is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLES = 16

SCRIPT = """
import collections, json, sys
from collections import UserDict
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, TensorDataset
import torch.distributed as dist
import indistill_fx as ifx
from indistill_fx.data.loaders import MemoryLoader

torch.set_num_threads(1)
COUNT = 16
Sample = collections.namedtuple("Sample", "image label")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.layer = [], nn.Linear(1, 5)

    def forward(self, image):
        if self.training:
            self.seen += image[:, 0].round().int().tolist()
        return self.layer(image)

class Numbers(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index % 5

class Stream(IterableDataset):
    def __iter__(self):
        return (Numbers()[index] for index in range(COUNT))

def as_dict(samples):
    return {"image": torch.stack([x for x, _ in samples]), "labels": torch.tensor([y for _, y in samples]), "file": ["f"] * len(samples)}

def as_mapping(samples):
    return UserDict(as_dict(samples))

def as_tuple(samples):
    return (*torch.utils.data.default_collate(samples), ["f"] * len(samples))

def as_named(samples):
    batch = as_dict(samples)
    return Sample(batch["image"], batch["labels"])

def ours():
    images = torch.arange(COUNT, dtype=torch.uint8).view(-1, 1)[:, :, None, None]
    loader = MemoryLoader(images, torch.arange(COUNT) % 5, mean=(0.0,), std=(1.0,), peak=1.0, batch_size=4, shuffle=True)
    return [(x[:, :, 0, 0], y) for x, y in loader]

def samplers():
    data = Numbers()
    dist.is_initialized() or dist.init_process_group("gloo")
    yield "shuffled", dict(dataset=data, shuffle=True)
    yield "random sampler", dict(dataset=data, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(1)))
    yield "shared out already", dict(dataset=data, sampler=DistributedSampler(data))
    yield "stream", dict(dataset=Stream())

found = {}
for name, how in samplers():
    for collate in (as_tuple, as_dict, as_mapping, as_named):
        net = Net()
        ifx.train(net, DataLoader(batch_size=4, collate_fn=collate, **how), epochs=1, device="cpu", progress=False)
        found[f"{name}, {collate.__name__}"] = net.seen
net = Net()
ifx.train(net, ours(), epochs=1, device="cpu", progress=False)
found["a list of batches"] = net.seen
json.dump(found, open(f"{sys.argv[1]}.{dist.get_rank()}.json", "w"))
"""


def test_two_processes_see_every_sample_once(tmp_path, commands):
    (tmp_path / "job.py").write_text(SCRIPT)
    python = str(commands / "python")
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", python]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "job.py"), str(tmp_path / "seen")],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"seen.{rank}.json").read_text()) for rank in range(2))
    assert len(first) == 17 and first.keys() == second.keys()
    for kind in first:
        assert len(first[kind]) == len(second[kind]) == SAMPLES // 2, kind
        assert sorted(first[kind] + second[kind]) == list(range(SAMPLES)), kind
