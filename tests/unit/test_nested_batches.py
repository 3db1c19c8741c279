"""Models that take dicts and tuples are trained, measured and quantised from batches that hold them, exactly as their flat twins are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.batch import split, with_features
from indistill_fx.errors import ConfigError
from indistill_fx.graph.view import View
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import samples_of

COUNT = 24
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(COUNT, 3, 8, 8, generator=GENERATOR)
VECTORS = torch.randn(COUNT, 6, generator=GENERATOR)
LABELS = torch.arange(COUNT) % 3


class Flat(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3))
        self.vector, self.hidden = nn.Linear(6, width), nn.Linear(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, 3)
        nn.init.uniform_(self.image[1].running_var, 0.5, 2)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        joined = torch.cat([self.image(image).mean((2, 3)), self.vector(vector).relu()], 1)
        return self.head(self.hidden(joined).relu())


class OfDict(Flat):
    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        return super().forward(obs["image"], obs["vector"])


class OfPair(Flat):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        image, vector = pair
        return super().forward(image, vector)


class Unsaid(Flat):
    def forward(self, obs) -> Tensor:  # type: ignore[no-untyped-def, override]
        return super().forward(obs["image"], obs["vector"])


class Deeper(Flat):
    def forward(self, obs) -> Tensor:  # type: ignore[no-untyped-def, override]
        return super().forward(obs["camera"]["image"], obs["vector"])


class WithMask(Flat):
    def forward(self, image: Tensor, more: dict[str, Tensor]) -> Tensor:
        return super().forward(image, more["vector"])


Yields = Callable[[Tensor, Tensor, Tensor], Any]


class Loader:
    def __init__(self, yields: Yields) -> None:
        self.yields = yields

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for part in (slice(i, i + 8) for i in range(0, COUNT, 8)):
            yield self.yields(IMAGES[part], VECTORS[part], LABELS[part])


def in_dict(image: Tensor, vector: Tensor) -> dict[str, Tensor]:
    return {"image": image, "vector": vector}


FLAT: Yields = lambda image, vector, labels: (image, vector, labels)  # noqa: E731
FORMS: dict[str, tuple[type[Flat], Yields]] = {
    "a dict and labels": (OfDict, lambda i, v, y: (in_dict(i, v), y)),
    "a dict alone in a tuple": (OfDict, lambda i, v, y: ((in_dict(i, v),), y)),
    "a dict by name": (OfDict, lambda i, v, y: {"obs": in_dict(i, v), "labels": y}),
    "its entries beside the labels": (OfDict, lambda i, v, y: {**in_dict(i, v), "labels": y}),
    "more entries than it takes": (OfDict, lambda i, v, y: {**in_dict(i, v), "path": ["a"] * len(y), "labels": y}),
    "another order": (OfDict, lambda i, v, y: ({"vector": v, "image": i}, y)),
    "no annotation": (Unsaid, lambda i, v, y: (in_dict(i, v), y)),
    "a dict in a dict": (Deeper, lambda i, v, y: ({"camera": {"image": i}, "vector": v}, y)),
    "a pair": (OfPair, lambda i, v, y: ((i, v), y)),
    "a list": (OfPair, lambda i, v, y: ([i, v], y)),
    "a pair by name": (OfPair, lambda i, v, y: {"pair": (i, v), "labels": y}),
    "a tensor, a dict and labels": (WithMask, lambda i, v, y: (i, {"vector": v}, y)),
    "a tensor and a dict, set apart": (WithMask, lambda i, v, y: ((i, {"vector": v}), y)),
}
forms = pytest.mark.parametrize("form", FORMS)


def models(kind: type[Flat]) -> tuple[Flat, Flat]:
    torch.manual_seed(0)
    return kind(8).eval(), kind(4)


def distilled(kind: type[Flat], yields: Yields, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    teacher, student = models(kind)
    record = ifx.distill(
        teacher, student, Loader(yields), epochs=2, curriculum=ifx.Curriculum(lengths=1), val_loader=Loader(yields), progress=False, seed=0,
        **more,
    )  # fmt: skip
    return record, student.state_dict()


@forms
def test_a_model_is_distilled_as_its_flat_twin_is(form: str) -> None:
    kind, yields = FORMS[form]
    record, weights = distilled(kind, yields)
    wanted, wanted_weights = distilled(Flat, FLAT)
    assert [stage.losses for stage in record.stages] == [stage.losses for stage in wanted.stages]
    assert record.accuracy == wanted.accuracy
    assert all(torch.equal(weights[name], value) for name, value in wanted_weights.items())


@forms
def test_a_model_is_trained_and_measured_as_its_flat_twin_is(form: str) -> None:
    kind, yields = FORMS[form]
    runs = []
    for model, loader in ((models(kind)[1], Loader(yields)), (models(Flat)[1], Loader(FLAT))):
        record = ifx.train(model, loader, epochs=1, val_loader=loader, progress=False, seed=0)
        runs.append((record.stages[0].losses, ifx.evaluate(model, loader).loss))
    assert runs[0] == runs[1]


def test_a_teacher_sees_images_inside_a_dict_as_its_view_says() -> None:
    view = View(size=(12, 12), dtype="float32")
    losses = [
        distilled(*given, teacher_view=view)[0].stages[0].losses for given in (FORMS["a dict and labels"], (Flat, FLAT))
    ]
    assert losses[0] == losses[1] != distilled(Flat, FLAT)[0].stages[0].losses


def test_teachers_together_take_a_dict() -> None:
    averaged = {}
    for kind, example in ((OfDict, (in_dict(IMAGES[:2], VECTORS[:2]),)), (Flat, (IMAGES[:2], VECTORS[:2]))):
        teachers = [models(kind)[0], models(kind)[1].eval()]
        views = [None, View(size=(12, 12))]
        averaged[kind] = ifx.ensemble(teachers, example_inputs=example, views=views)(*example)
    assert torch.equal(averaged[OfDict], averaged[Flat])


def test_cached_features_lie_beside_the_dict() -> None:
    takes = ifx.trace(OfDict(), (in_dict(IMAGES[:2], VECTORS[:2]),), role="student").inputs
    numbers = torch.arange(COUNT)
    made = with_features(
        {**in_dict(IMAGES, VECTORS), "labels": LABELS, "indices": numbers}, takes, lambda i: {"tap": i * 2}
    )
    parts = split(made, takes, where="Test")
    assert parts.features is not None and torch.equal(parts.features["tap"], numbers * 2)
    assert parts.calls[0].tensors[0] is IMAGES and parts.calls[0].tensors[1] is VECTORS and parts.labels is not None


def test_a_compressed_model_takes_the_dict_too(tmp_path: Path) -> None:
    students = []
    for kind, yields in (FORMS["a dict and labels"], (Flat, FLAT)):
        loader = Loader(yields)
        made = ifx.compress(
            models(kind)[0], loader, macs=0.5, epochs=2, progress=False, run_dir=tmp_path / kind.__name__, export=False
        )
        students.append(made.student)
    ofdict, flat = (student.eval() for student in students)
    assert torch.equal(ofdict(in_dict(IMAGES, VECTORS)), flat(IMAGES, VECTORS))


@pytest.mark.parametrize("form", ["a dict and labels", "a dict by name", "its entries beside the labels", "a pair"])
def test_an_int8_file_is_calibrated_from_such_batches(form: str, tmp_path: Path) -> None:
    drops = []
    for kind, yields in (FORMS[form], (Flat, FLAT)):
        image, vector, _ = IMAGES[:2], VECTORS[:2], LABELS
        example = {OfDict: (in_dict(image, vector),), OfPair: ((image, vector),), Flat: (image, vector)}[kind]
        file = tmp_path / f"{kind.__name__}.onnx"
        ifx.export_onnx(models(kind)[1].eval(), file, example)
        loader = Loader(yields)
        report = ifx.quantize_onnx(
            file, tmp_path / f"{kind.__name__}8.onnx", calibration=loader, evaluation=loader, max_drop=100
        )
        drops.append((report.metric_fp32, report.metric_int8, report.agreement))
    assert drops[0] == drops[1]


class Typed(Flat):
    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        return image


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (Typed(), (in_dict(IMAGES, VECTORS), LABELS[:1]), None),
        (Unsaid(), {**in_dict(IMAGES, VECTORS), "labels": LABELS}, "write `obs: dict` in the forward's signature"),
        (Flat(), (IMAGES, in_dict(IMAGES, VECTORS), LABELS), "`vector` of the batch is of type dict, not a tensor"),
        (OfDict(), (IMAGES, LABELS), None),
    ],
    ids=["one of its entries is its name", "flat, no annotation", "a dict for a tensor", "a tensor for a dict"],
)
def test_what_is_known_of_an_argument_decides(model: nn.Module, batch: Any, words: str | None) -> None:
    if words is None:
        (call,) = split(batch, Inputs.of(model), where="Test").calls
        assert call.tensors[0] is IMAGES and len(call.tensors) == 1
        return
    with pytest.raises(ConfigError) as error:
        split(batch, Inputs.of(model), where="Test")
    assert words in f"{error.value} {error.value.hint}"


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.lstm, self.head = nn.LSTM(6, width, 2, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(self.lstm(x, (self.first(state[0]), self.first(state[1])))[0][:, -1])


def with_states(image: Tensor, vector: Tensor, labels: Tensor) -> Any:
    state = torch.stack([vector, -vector])
    return vector[:, None].expand(-1, 4, -1), (state, 2 * state), labels


def test_states_have_the_batch_in_their_second_axis(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = ifx.compress(
        Recurrent(8).eval(), Loader(with_states), macs=0.5, epochs=2, progress=False, run_dir=tmp_path, val_loader=Loader(with_states)
    )  # fmt: skip
    x, state, labels = with_states(IMAGES, VECTORS, LABELS)
    assert made.student.eval()(x, state).shape == (COUNT, 3)
    part = samples_of((x, state, labels), slice(5))
    assert torch.equal(part[0], x[:5]) and torch.equal(part[1][1], state[1][:, :5]) and torch.equal(part[2], labels[:5])
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    assert [one.name for one in session.get_inputs()] == ["x", "state.0", "state.1"]
    fed = {"x": x[:1], "state.0": state[0][:, :1], "state.1": state[1][:, :1]}
    (found,) = session.run(None, {name: value.contiguous().numpy() for name, value in fed.items()})
    expected = made.student(x[:1], (state[0][:, :1], state[1][:, :1])).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)
