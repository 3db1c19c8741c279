"""Modules whose arguments are dicts, tuples or None: the file takes their tensors one by one."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx

IMAGE, VECTOR = torch.randn(2, 3, 8, 8), torch.randn(2, 6)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        nn.init.uniform_(self.image[1].running_var, 0.5, 2)
        self.vector, self.head = nn.Linear(6, 4), nn.Linear(8, 5)

    def forward(self, obs: dict[str, Tensor], goal: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.cat([self.image(obs["image"]), self.vector(obs["vector"])], 1)
        return {"action": self.head(hidden if goal is None else hidden + goal)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 4, num_layers=2, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, state = self.lstm(x, state)
        return self.head(hidden[:, -1]), state


def inputs_of(file: Path) -> list[str]:
    return [value.name for value in onnxruntime.InferenceSession(str(file)).get_inputs()]


@pytest.mark.parametrize("form", ["in order", "by name", "with None", "by name with None", "with a goal"])
def test_a_dict_is_taken_apart(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    model, obs, file = Policy().eval(), {"image": IMAGE, "vector": VECTOR}, tmp_path / "policy.onnx"
    goal = torch.randn(2, 8)
    example = {
        "in order": (obs,), "by name": {"obs": obs}, "with None": (obs, None), "by name with None": {"obs": obs, "goal": None},
        "with a goal": (obs, goal),
    }[form]  # fmt: skip
    more = ("goal",) if form == "with a goal" else ()
    report = ifx.export_onnx(model, file, example, batch_sizes=(1, 5))
    assert report.input_names == ("obs.image", "obs.vector", *more) == tuple(inputs_of(file))
    assert report.output_names == ("action",) and {row.batch_size for row in report.parity} == {1, 5}
    fed = {"obs.image": IMAGE, "obs.vector": VECTOR} | ({"goal": goal} if more else {})
    (found,) = onnxruntime.InferenceSession(str(file)).run(None, {name: value.numpy() for name, value in fed.items()})
    torch.testing.assert_close(torch.from_numpy(found), model(obs, goal if more else None)["action"].detach())
    assert ifx.check_onnx(file, model, example).agrees
    with torch.no_grad():
        model.head.bias += 1
    assert not ifx.check_onnx(file, model, example).agrees


def test_a_state_goes_in_and_out_where_the_batch_is_fixed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, state = Recurrent().eval(), torch.randn(1, 3, 6), (torch.randn(2, 1, 4), torch.randn(2, 1, 4))
    file = tmp_path / "recurrent.onnx"
    report = ifx.export_onnx(model, file, (x, state), dynamic_batch=False)
    assert report.input_names == ("x", "state.0", "state.1") == tuple(inputs_of(file))
    session = onnxruntime.InferenceSession(str(file))
    kept = state
    for _ in range(3):
        fed = {"x": x, "state.0": kept[0], "state.1": kept[1]}
        logits, *new = session.run(None, {name: value.numpy() for name, value in fed.items()})
        with torch.no_grad():
            expected, kept = model(x, kept)
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-5)
        for one, other in zip(new, kept, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-5, rtol=1e-5)
    assert ifx.check_onnx(file, model, (x, state)).agrees


def test_a_state_whose_batch_is_not_first_is_refused_where_the_batch_is_open(tmp_path: Path) -> None:
    example = (torch.randn(3, 3, 6), (torch.randn(2, 3, 4), torch.randn(2, 3, 4)))
    with pytest.raises(ifx.ConfigError, match=r"must share their first \(batch\) dimension.* dynamic_batch=False"):
        ifx.export_onnx(Recurrent(), tmp_path / "recurrent.onnx", example)
    ambiguous = (torch.randn(2, 3, 6), (torch.randn(2, 2, 4), torch.randn(2, 2, 4)))  # as many layers as samples
    with pytest.raises(ifx.IndistillError):
        ifx.export_onnx(Recurrent(), tmp_path / "recurrent.onnx", ambiguous)
    assert not list(tmp_path.iterdir())
