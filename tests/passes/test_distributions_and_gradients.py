"""What policies, mixture heads, spiking networks and flows do: torch.distributions, gradients of their own, weights of a QR."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

import indistill_fx as ifx
from indistill_fx.compression.basis import in_both_modes
from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import FrontendError


class Policy(nn.Module):
    """Samples in train mode, as the actor of an actor-critic does."""

    def __init__(self):
        super().__init__()
        self.hidden, self.mean, self.scale = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.hidden(x))
        normal = Normal(self.mean(hidden), F.softplus(self.scale(hidden)))
        action = normal.rsample() if self.training else normal.mean
        return action, normal.log_prob(action).sum(-1)


class Choice(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = Categorical(logits=self.head(torch.relu(self.hidden(x))))
        return chosen.logits, chosen.entropy()


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.heads = nn.Linear(6, 16), nn.ModuleList(nn.Linear(16, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        logits, mean, scale = (head(torch.relu(self.hidden(x))) for head in self.heads)
        return MixtureSameFamily(Categorical(logits=logits), Normal(mean, F.softplus(scale))).log_prob(x[:, 0])


@pytest.fixture(autouse=True)
def checking(monkeypatch):
    """torch's compiler turns the checks off for the whole process; an earlier test may have used it."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


@pytest.mark.parametrize("make", [Policy, Choice, Mixture])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_distributions_are_traced(make, role):
    torch.manual_seed(0)
    net, other = make(), torch.randn(5, 6)
    traced = ifx.trace(net, torch.randn(2, 6), role=role)
    assert traced.report.leaves == ()
    sides = [module.train(role == "student") for module in (traced.graph_module, net)]
    outputs = [(torch.manual_seed(1), side(other))[1] for side in sides]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    half = ifx.shrink(ifx.trace(net, torch.randn(2, 6), role="teacher"), ratio=0.5)
    assert {layer.path: len(layer.kept) for layer in half.report.layers if len(layer.kept) < layer.of} == {"hidden": 8}
    assert torch.distributions.Distribution._validate_args  # as it was


def test_what_a_distribution_refuses_is_still_refused():
    """The checks that a graph leaves out are made where the module itself runs."""

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return Normal(y, -y.abs()).mean

    with pytest.raises(FrontendError, match="Expected parameter scale"):
        ifx.trace(Wrong(), torch.randn(2, 6))


class Spike(torch.autograd.Function):
    """A threshold with the gradient of a smooth one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1 + x**2)


class Fires(nn.Module):
    def __init__(self, *, kept: bool):
        super().__init__()
        self.function = Spike.apply if kept else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x - 0.1) if self.function else Spike.apply(x - 0.1)


def spiking(*, kept: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), Fires(kept=kept), nn.Linear(16, 3))


def test_a_functions_apply_may_be_kept_in_an_attribute():
    net, x = spiking(kept=True), torch.randn(5, 6)
    traced = ifx.trace(net, torch.randn(2, 6), role="student")
    assert traced.report.leaves == ("1",)
    traced.graph_module(x).sum().backward()
    got = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    expected = [parameter.grad for parameter in net.parameters()]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert float(expected[0].abs().max()) > 0


def test_the_forward_of_a_network_itself_says_what_to_write():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.spike = nn.Linear(6, 3), Spike.apply

        def forward(self, x: Tensor) -> Tensor:
            return self.spike(self.a(x))

    with pytest.raises(FrontendError, match=r"calls Spike, a function with a gradient of its own") as caught:
        ifx.trace(Net(), torch.randn(2, 6), role="student")
    assert "Write Spike.apply(...) there" in str(caught.value)


@pytest.mark.parametrize("kept", [False, True])
def test_a_student_says_which_gradients_it_lacks(kept):
    said: list[str] = []
    in_both_modes(ifx.trace(spiking(kept=kept).eval(), torch.randn(2, 6)), say=said.append)
    assert said[1:] == [
        "The gradients that `Spike` defines are not in the student: where what they compute has no gradient, such as rounding or a"
        " threshold, the layers before learn nothing."
    ]


def test_weights_in_another_order_in_memory_have_source_code():
    """torch gives the weight of a QR decomposition column by column; a product rounds otherwise with the same rows in order."""

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linalg.qr(torch.randn(48, 48))[0])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.linear(x, self.weight), torch.slogdet(self.weight)[1].expand(x.shape[0])

    torch.manual_seed(0)
    net, x = Flow().eval(), torch.randn(2, 48)
    traced = ifx.trace(net, x)
    strides = net.weight.stride()
    written = source_of(traced)
    torch.testing.assert_close(written.build().eval()(x), net(x))
    assert net.weight.stride() == strides == (1, 48)
