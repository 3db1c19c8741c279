"""A student that reuses its teacher's classifier: what it computes, what trains, and what is refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import indistill_fx as ifx
from indistill_fx.cli import run
from indistill_fx.curriculum import Curriculum
from indistill_fx.demo.networks import DigitsStudent, DigitsTeacher
from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import digest
from indistill_fx.losses import MAIN_LOSSES, Outputs, main_loss
from tests.nets import PreActivation, Residual, TinyTransformer, images, unsettle

STUDENT = """
import torch
from indistill_fx import load, reuse_classifier
from indistill_fx.demo.networks import DigitsStudent

def make():
    teacher = load("indistill_fx.demo:DigitsTeacher@t/student.safetensors")
    return reuse_classifier(teacher, DigitsStudent(), example_inputs=torch.zeros(2, 1, 8, 8))
"""


def mlp(width: int, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))


class Normed(nn.Module):
    """A batch norm and dropout behind the last map, as in a DenseNet."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1))
        self.norm, self.drop, self.head = nn.BatchNorm2d(width), nn.Dropout(), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.body(x))).mean((2, 3))))


@pytest.mark.parametrize(
    ("own", "other"), [((6, 7, 4, 4), (6, 7, 4, 4)), ((6, 7, 2, 3), (6, 7, 4, 6)), ((6, 7), (6, 7))]
)
def test_the_loss_equals_numpy(own, other):
    generator = torch.Generator().manual_seed(0)
    f_s, f_t = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (own, other))
    target = f_t.numpy()
    if own != other:
        target = target.reshape(6, 7, 2, 2, 3, 2).mean((3, 5))
    expected = 2.5 * np.mean((f_s.numpy() - target) ** 2)
    earlier = {"a": torch.zeros(6, 2), "last": f_s}, {"a": torch.ones(6, 2), "last": f_t}
    found = main_loss("simkd", weight=2.5)(*(Outputs(None, None, features) for features in earlier), None)
    assert found.dtype == torch.float64 and found.item() == pytest.approx(expected, rel=1e-12)


def test_it_computes_the_teachers_layers_after_the_projected_feature():
    torch.manual_seed(0)
    teacher, student = unsettle(DigitsTeacher()).eval(), unsettle(DigitsStudent())
    before = digest(teacher), digest(student)
    made = ifx.reuse_classifier(teacher, student, example_inputs=torch.zeros(2, 1, 8, 8))
    assert (digest(teacher), digest(student)) == before
    made.eval()
    x = torch.randn(5, 1, 8, 8)
    feature = made.projector(made.student(x))
    assert feature.shape == (5, 128, 2, 2) and bool((feature >= 0).all())  # the teacher's comes out of a ReLU
    torch.testing.assert_close(made(x), teacher.fc(feature.mean((2, 3))))
    assert not any(parameter.requires_grad for parameter in made.classifier.parameters())
    own = {id(parameter) for parameter in student.parameters()}
    assert all(id(parameter) in own for parameter in made.student.parameters())


def test_a_larger_map_is_pooled_and_a_feature_below_zero_has_no_last_relu():
    teacher, student = Normed(16), PreActivation()
    x = images(size=16)
    pair = ("body.2", ":add")
    plan = ifx.align(teacher, student, example_inputs=x, fixed=[pair])
    plan = plan.model_copy(update={"pairs": tuple(own for own in plan.pairs if own.student == pair[1])})
    made = ifx.reuse_classifier(teacher, student, plan, example_inputs=x)
    assert isinstance(made.projector[0], nn.AdaptiveAvgPool2d) and isinstance(made.projector[-1], nn.BatchNorm2d)
    assert made.projector(made.student(x)).shape == (2, 16, 4, 4)


def test_the_classifier_keeps_the_teachers_statistics_while_the_student_trains():
    torch.manual_seed(0)
    teacher, x = unsettle(Normed(16)), images(8, 16)
    made = ifx.reuse_classifier(teacher, Normed(8), example_inputs=x).train()
    plan = ifx.align(teacher, made, example_inputs=x)
    assert [(pair.teacher, pair.student) for pair in plan.pairs] == [(":relu", "projector")]
    before, own = digest(made.classifier), digest(made.projector)
    stage = ifx.compile_stages(teacher, made, plan, main="simkd", example_inputs=x, curriculum=Curriculum(lengths=1))[
        -1
    ]
    optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], 0.1)
    stage.train()((x, torch.arange(8) % 4)).backward()
    optimizer.step()
    made(x)
    assert digest(made.classifier) == before and digest(made.projector) != own
    assert not any(part.training for part in made.classifier.modules())


def test_vectors_of_two_mlps():
    x = torch.randn(4, 5)
    made = ifx.reuse_classifier(mlp(32), mlp(8), example_inputs=x)
    assert made(x).shape == (4, 3) and isinstance(made.projector[0], nn.Linear)


def test_digits_learn_from_it_and_the_exported_student_is_whole(tmp_path):
    data = ifx.open_data("digits", batch_size=64)
    torch.manual_seed(0)
    teacher, student = DigitsTeacher(), DigitsStudent()
    shared = {"val_loader": data.test, "device": "cpu", "progress": False, "learning_rate": 3e-3}
    ifx.train(teacher, data.train, epochs=3, **shared)
    made = ifx.reuse_classifier(teacher, student, example_inputs=torch.zeros(2, 1, 8, 8))
    classifier = copy.deepcopy(made.classifier.state_dict())
    record = ifx.distill(teacher, made, data.train, main="simkd", curriculum=Curriculum(lengths=0), epochs=4, **shared)
    assert record.value > 0.9
    assert all(torch.equal(value, classifier[name]) for name, value in made.classifier.state_dict().items())
    ifx.export_onnx(made.eval(), tmp_path / "student.onnx", torch.zeros(2, 1, 8, 8))
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    x = torch.randn(3, 1, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, made(x).detach().numpy(), atol=1e-4)


def test_from_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.py").write_text(STUDENT)
    common = ["--data", "digits", "--limit", "100", "--device", "cpu"]
    assert run(["train", "indistill_fx.demo:DigitsTeacher", *common, "--epochs", "1", "-o", "t"]) == 0
    models = ["indistill_fx.demo:DigitsTeacher@t/student.safetensors", "student.py:make"]
    assert run(["distill", *models, *common, "--main", "simkd", "--no-warmup", "--epochs", "1", "-o", "s"]) == 0
    assert json.loads((tmp_path / "s/run.json").read_text())["status"] == "done"
    assert run(["evaluate", "s", *common]) == 0
    assert run(["export", "s", "-o", "s.onnx"]) == 0
    capsys.readouterr()
    untrained = ["indistill_fx.demo:DigitsTeacher", "student.py:make"]
    assert run(["distill", *untrained, *common, "--main", "simkd", "--no-warmup", "--epochs", "1", "-o", "u"]) == 2
    assert "The student reuses the classifier of another teacher" in " ".join(capsys.readouterr().err.split())


def test_a_student_with_a_classifier_of_its_own_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models = ["indistill_fx.demo:DigitsTeacher", "indistill_fx.demo:DigitsStudent"]
    common = ["--data", "digits", "--limit", "100", "--device", "cpu", "--epochs", "1", "-o", "s"]
    assert run(["distill", *models, *common, "--main", "simkd", "--no-warmup"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "`fc.weight` after it would keep its initial values" in told and "reuse_classifier" in told


def test_what_cannot_be_reused_is_refused():
    x = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ConfigError, match="cannot be reused after"):
        ifx.reuse_classifier(TinyTransformer(), TinyTransformer(), example_inputs=x)
    plan = ifx.align(Residual(), Residual(), example_inputs=x)
    with pytest.raises(ConfigError, match="has no pairs"):
        ifx.reuse_classifier(Residual(), Residual(), plan.model_copy(update={"pairs": ()}), example_inputs=x)
    assert "simkd" in MAIN_LOSSES
