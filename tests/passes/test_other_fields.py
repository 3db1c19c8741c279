"""What networks of recommender systems, tables and recurrent policies do, and others do not."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.graph.edit import batch_of


class Offsets(nn.Module):
    """One table for all categories, as in torch-fm: the offsets are an array of numpy."""

    def __init__(self, make: str):
        super().__init__()
        self.table, self.offsets, self.make = nn.Embedding(12, 8), np.array((0, 4, 9), dtype=np.int64), make

    def forward(self, x: Tensor) -> Tensor:
        if self.make == "new_tensor":
            return self.table(x + x.new_tensor(self.offsets).unsqueeze(0))
        if self.make == "from_numpy":
            return self.table(x + torch.from_numpy(self.offsets))
        return self.table(x + torch.tensor(self.offsets, device=x.device))


class Clicks(nn.Module):
    def __init__(self, make: str):
        super().__init__()
        self.embedding, self.hidden, self.head = Offsets(make), nn.Linear(24, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(x).view(-1, 24)))).squeeze(1)


def categories(rows: int) -> Tensor:
    return torch.stack([torch.randint(0, n, (rows,)) for n in (4, 5, 3)], 1)


@pytest.mark.parametrize("make", ["new_tensor", "from_numpy", "tensor"])
def test_tensors_of_numpys_arrays_are_constants(make):
    torch.manual_seed(0)
    net, x = Clicks(make).eval(), categories(5)
    traced = ifx.trace(net, categories(2))
    assert traced.report.leaves == ()
    assert torch.equal(traced.graph_module(x), net(x))
    half = ifx.shrink(traced, ratio=0.5)
    assert {layer.path: len(layer.kept) for layer in half.report.layers if layer.of > 1} == {
        "embedding.table": 4,
        "hidden": 8,
    }


def test_an_array_of_places_is_an_index():
    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.order, self.head = np.array([3, 1, 2]), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[:, self.order])

    net, x = Picked(), torch.randn(5, 4)
    traced = ifx.trace(net, torch.randn(2, 4))
    assert traced.report.leaves == ()
    assert torch.equal(traced.graph_module(x), net(x))


class Bags(nn.Module):
    """A bag of words for each sample, told apart by offsets, as in DLRM."""

    def __init__(self):
        super().__init__()
        self.bag, self.hidden, self.head = nn.EmbeddingBag(20, 8, mode="sum"), nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, dense: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.bag(places, offsets)))) + dense


def test_whole_numbers_in_order_stay_in_order_in_other_batches():
    offsets, lengths, labels = torch.tensor([0, 3, 5]), torch.tensor([9, 7, 7]), torch.tensor([2, 0, 1])
    new = batch_of((offsets, lengths, labels), 5, example_size=3)
    assert [tensor.tolist() for tensor in new] == [[0, 0, 3, 3, 5], [9, 9, 7, 7, 7], [2, 0, 1, 2, 0]]
    assert batch_of((offsets, labels), 1, example_size=3)[0].tolist() == [0]
    rising = torch.tensor([2, 4, 9])
    assert [tensor.tolist() for tensor in batch_of((labels, rising), 1, example_size=3)] == [
        [1],
        [9],
    ]  # the longest comes first


def test_bags_told_apart_by_offsets_are_halved():
    torch.manual_seed(0)
    example = torch.randn(2, 1), torch.randint(0, 20, (5,)), torch.tensor([0, 3])
    half = ifx.shrink(ifx.trace(Bags(), example), ratio=0.5)  # compared on three samples
    assert {layer.path: len(layer.kept) for layer in half.report.layers if layer.of > 1} == {"bag": 4, "hidden": 8}


class Last(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], layers: int):
        super().__init__()
        self.rnn, self.head = kind(6, 8, layers, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.rnn(x)[1]
        return self.head((state[0] if isinstance(self.rnn, nn.LSTM) else state)[-1])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_work_of_a_recurrent_layer_counts_where_its_last_state_is_read(kind, gates, layers):
    traced = ifx.trace(Last(kind, layers), torch.randn(2, 5, 6))
    assert traced.macs == 5 * gates * 8 * ((6 + 8) + (layers - 1) * (8 + 8)) + 8 * 3
