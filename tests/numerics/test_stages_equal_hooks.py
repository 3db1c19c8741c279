"""A stage's loss and gradients equal those of the plain way: both full networks, forward hooks, the kept channels selected."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import indistill_fx as ifx
from indistill_fx.graph.module_state import digest
from tests.nets import Cnn32, Residual, images, seeded


def hooked_feature(module: nn.Module, tap: str, x: torch.Tensor) -> torch.Tensor:
    """The output of the tap's module in a forward pass of the whole network; `path@2` is its second call."""
    path, _, call = tap.partition("@")
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(out))
    module(x)
    handle.remove()
    return seen[int(call or 1) - 1]


def pair_of(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    if name == "chain":
        return seeded(Cnn32), seeded(Cnn32, (8, 16, 32), 64, seed=1), images(6, 32)
    return seeded(Residual, 16, 3, dropout=0.2), seeded(Residual, 8, 1, seed=1), images(6)


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_warmup_losses_and_gradients_equal_the_hook_baseline(name):
    # In float64: in float32 the gradient of a bias before a norm is the rounding of one order of summation or another.
    teacher, student, x = (part.double() for part in pair_of(name))
    plan = ifx.align(teacher, student, example_inputs=x)
    assert len(plan.pairs) == 3
    assert all(len(pair.kept) == pair.student_shape[1] for pair in plan.pairs)
    twin = copy.deepcopy(student)
    before = digest(teacher)
    stages = ifx.compile_stages(teacher, student, plan, main=None, example_inputs=x)
    teacher_eval = copy.deepcopy(teacher).eval()
    for stage, pair in zip(stages, plan.pairs, strict=True):
        student.load_state_dict(twin.state_dict())
        stage.train()
        student.zero_grad()
        twin.zero_grad()
        with torch.no_grad():
            wanted = hooked_feature(teacher_eval, pair.teacher, x)[:, list(pair.kept)]
        reference = copy.deepcopy(twin).train()
        expected = F.mse_loss(hooked_feature(reference, pair.student, x), wanted)
        expected.backward()
        loss = stage((x, torch.zeros(6, dtype=torch.long)))
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        compared = 0
        # a bias in front of a norm has no gradient but round-off: measured against the largest gradient of the network
        scale = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
        for (path, own), other in zip(student.named_parameters(), reference.parameters(), strict=True):
            if other.grad is None:
                assert own.grad is None, path
            else:
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6 * scale)
                compared += 1
        assert compared > 0
    assert digest(teacher) == before


def test_another_channel_would_be_noticed():
    """Negative control: one kept channel exchanged changes the loss beyond the tolerance."""
    teacher, student, x = pair_of("chain")
    plan = ifx.align(teacher, student, example_inputs=x)
    first = plan.pairs[0]
    dropped = next(c for c in range(first.teacher_shape[1]) if c not in first.kept)
    other = first.model_copy(update={"kept": tuple(sorted({*first.kept[1:], dropped}))})
    swapped = plan.model_copy(update={"pairs": (other, *plan.pairs[1:])})
    losses = [ifx.compile_stages(teacher, student, p, main=None, example_inputs=x)[0](x) for p in (plan, swapped)]
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]


def test_main_stage_is_hinton_kd_on_the_users_own_student():
    teacher, student, x = pair_of("chain")
    labels = torch.arange(6) % 10
    stage = ifx.compile_stages(teacher, student, example_inputs=x)[-1].train()
    with torch.no_grad():
        wanted = copy.deepcopy(teacher).eval()(x)
    logits = copy.deepcopy(student).train()(x)
    kl = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(wanted / 4, 1), reduction="batchmean") * 16
    torch.testing.assert_close(stage((x, labels)), 0.1 * F.cross_entropy(logits, labels) + 0.9 * kl, rtol=1e-5, atol=0)
    stage((x, labels)).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert {id(p) for p in stage.student.parameters()} == {id(p) for p in student.parameters()}


def test_training_a_stage_trains_the_students_norm_statistics():
    teacher, student, x = pair_of("residual")
    stage = ifx.compile_stages(teacher, student, main=None, example_inputs=x)[0].train()
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    stage(x)
    changed = {name for name, buffer in student.named_buffers() if not torch.equal(buffer, before[name])}
    assert "stem.1.running_mean" in changed
    assert not any(name.startswith(("layer2", "layer3")) for name in changed)


def test_a_stage_holds_only_what_it_computes():
    teacher, student, x = pair_of("residual")
    stages = ifx.compile_stages(teacher, student, main=None, example_inputs=x)
    sizes = [sum(p.numel() for p in stage.teacher.parameters()) for stage in stages]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.2 * sum(p.numel() for p in teacher.parameters())
    assert not any(p.requires_grad for stage in stages for p in stage.teacher.parameters())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "a str"),
        ([], "a list of "),
        ({"image": torch.zeros(1), "mask": torch.zeros(1)}, "a dict of image, mask"),
    ],
)
def test_a_batch_that_cannot_be_read(batch, message):
    teacher, student, x = pair_of("chain")
    stage = ifx.compile_stages(teacher, student, main=None, example_inputs=x)[0]
    with pytest.raises(ifx.ConfigError, match=f"got a batch it cannot read: {message}.*Let the loader yield"):
        stage(batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "`x` of the batch is of type int, not a tensor"),
        ({"x": "text"}, "`x` of the batch is of type str, not a tensor"),
        ((torch.zeros(2, 3, 32, 32), [1, 2]), "`labels` of the batch is of type list, not a tensor"),
        (
            (torch.zeros(2, 3, 32, 32).double(),),
            r"`x` of the batch is torch.float64, not torch.float32. Convert it: x.to",
        ),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "`x` of the batch is torch.uint8, not torch.float32"),
        (torch.zeros(2, 3, 32, 32, device="meta"), "`x` of the batch is on meta, not on cpu, where the student is"),
        (
            (torch.zeros(2, 3, 32, 32), torch.zeros(2, device="meta")),
            "`labels` of the batch is on meta, not on cpu, where the student is",
        ),
    ],
)
def test_a_batch_with_a_wrong_entry_names_stage_and_argument(batch, message):
    teacher, student, x = pair_of("chain")
    stage = ifx.compile_stages(teacher, student, main=None, example_inputs=x)[0]
    with pytest.raises(ifx.ConfigError, match=f"^Stage `{stage.name}`: {message}"):
        stage(batch)


def test_an_input_called_as_a_function_of_python_is_checked_too():
    """fx calls the node of `nn.Sequential`'s argument `input` by another name."""
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)) for _ in range(2))
    curriculum = ifx.Curriculum(lengths=[])
    (stage,) = ifx.compile_stages(teacher, student, curriculum=curriculum, example_inputs=torch.randn(2, 3, 2, 2))
    with pytest.raises(ifx.ConfigError, match=r"`input` of the batch is torch.uint8, not torch.float32"):
        stage((torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])))


def test_a_stage_converted_or_under_autocast_takes_what_fits_it():
    teacher, student, x = pair_of("chain")
    stage = ifx.compile_stages(teacher, student, main=None, example_inputs=x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(stage(x.to(torch.bfloat16)))
    assert stage.double()(x.double()).dtype == torch.float64
    with pytest.raises(ifx.ConfigError, match=r"`x` of the batch is torch.float32, not torch.float64"):
        stage(x)


def test_a_tap_that_is_only_the_input_is_refused_at_compile_time():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Identity(), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.first(x)).mean((2, 3))

    teacher, student = (ifx.trace(seeded(Bare), images(2), role=role) for role in ("teacher", "student"))
    plan = ifx.align(teacher, student, fixed=[("conv", "conv")])
    bare = plan.pairs[0].model_copy(update={"teacher": "first", "teacher_shape": (2, 3, 16, 16), "kept": None})
    with pytest.raises(ifx.ConfigError, match="no tap in the teacher: `first` is not computed from the input"):
        ifx.compile_stages(teacher, student, plan.model_copy(update={"pairs": (bare,)}), main=None)


def test_a_stage_counts_its_work():
    """Multiply-accumulates of both halves; the teacher's are those of the narrowed teacher."""
    teacher, student, x = pair_of("chain")
    first = ifx.compile_stages(teacher, student, main=None, example_inputs=x)[0]
    assert first.macs == (8 * 27 * 30 * 30, 8 * 27 * 30 * 30)


def test_frozen_students_are_refused_at_compile_time():
    teacher, student, x = pair_of("chain")
    student.requires_grad_(False)
    with pytest.raises(ifx.ConfigError, match="has nothing to train"):
        ifx.compile_stages(teacher, student, example_inputs=x)
