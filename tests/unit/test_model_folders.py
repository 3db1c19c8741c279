"""Folders of transformers and timm as model specs: their weights and what they know, read without running anything of theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models._hub import save_for_hf
from torch import nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.loading.input_facts import describe_configuration, facts_of
from indistill_fx.loading.load import load_source
from indistill_fx.loading.spec import parse_spec
from indistill_fx.runs.load import absolute, runs_code

IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
BERT = transformers.BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
)
VIT = transformers.ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
    num_channels=1, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
)  # fmt: skip


def saved(model: Any, folder: Path) -> nn.Module:
    """Written by its own library, with weights that no initialisation gives."""
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape).to(torch.float16))
    model.save_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]


def changed(folder: Path, **entries: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> tuple[Path, nn.Module]:
    return tmp_path / "bert", saved(transformers.BertForSequenceClassification(BERT), tmp_path / "bert")


def test_a_folder_of_transformers(bert: tuple[Path, nn.Module], capfd: pytest.CaptureFixture[str]) -> None:
    folder, original = bert
    source = load_source(str(folder))
    assert type(source.module) is type(original) and source.module.training and source.notes == ()
    assert torch.equal(source.module.eval()(IDS).logits, original(IDS).logits)
    assert capfd.readouterr() == ("", "")  # neither bars nor tables of transformers
    assert type(ifx.load(folder)) is type(original)


def test_halves_become_floats(bert: tuple[Path, nn.Module]) -> None:
    folder, original = bert
    original.half().save_pretrained(folder)  # type: ignore[operator]
    source = load_source(str(folder))
    assert source.notes == ("weights: float16 in the folder, float32 here",)
    assert {value.dtype for value in source.module.parameters()} == {torch.float32}
    assert torch.equal(source.module.eval()(IDS).logits, original.float()(IDS).logits)


def test_another_configuration_has_new_weights(bert: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, original = bert
    spec = f"{folder}?num_hidden_layers=1&hidden_act=relu"
    source = load_source(spec)
    assert len(source.module.bert.encoder.layer) == 1 and source.module.config.hidden_act == "relu"
    assert source.notes == (
        "its weights are new, because they are asked for with another configuration: num_hidden_layers=1, hidden_act='relu'",
    )
    torch.save(source.module.state_dict(), tmp_path / "own.pt")
    again = load_source(f"{spec}@{tmp_path / 'own.pt'}")
    assert again.notes == ()
    assert torch.equal(again.module.eval()(IDS).logits, source.module.eval()(IDS).logits)
    torch.save(original.state_dict(), tmp_path / "tuned.pt")
    (folder / "model.safetensors").unlink()  # not needed then
    tuned = load_source(f"{folder}@{tmp_path / 'tuned.pt'}").module.eval()
    assert torch.equal(tuned(IDS).logits, original(IDS).logits)


def test_what_a_folder_knows_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    saved(transformers.ViTForImageClassification(VIT), folder)
    source = load_source(str(folder))
    assert (source.input_size, source.wanted_size, source.classes) == ((1, 16, 16), (16, 16), ("cat", "dog"))
    assert source.normalisation is None
    given = {"image_mean": [0.5], "image_std": [0.25], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(given))
    source = load_source(str(folder))
    assert source.normalisation == source.wanted_normalisation == ((0.5,), (0.25,))
    assert source.input_size == (1, 16, 16)  # the model takes no other
    (folder / "preprocessor_config.json").write_text(json.dumps({**given, "rescale_factor": 1 / 127.5}))
    assert load_source(str(folder)).normalisation == ((0.25,), (0.125,))
    (folder / "preprocessor_config.json").write_text(json.dumps({**given, "do_normalize": False}))
    assert load_source(str(folder)).normalisation == ((0.0,), (1.0,))
    other = load_source(f"{folder}?image_size=8")
    assert other.wanted_normalisation is None and other.module(torch.randn(2, 1, 8, 8)).logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("given", "channels", "expected"),
    [
        ({"do_normalize": False}, 3, ((0.0,) * 3, (1.0,) * 3)),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 1, ((0.5,), (0.25,))),
        ({"image_mean": 0.5, "image_std": 0.25}, 3, ((0.5,) * 3, (0.25,) * 3)),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.1, 0.2, 0.3]}, 1, None),
    ],
)
def test_a_normalisation_has_a_number_for_every_channel(given: dict[str, Any], channels: int, expected: Any) -> None:
    facts = describe_configuration({"image_size": 16, "num_channels": channels}, given, pretrained=True)
    assert facts.normalisation == facts.wanted_normalisation == expected


def test_a_model_for_images_without_a_folder_knows_its_size() -> None:
    assert facts_of(transformers.ViTForImageClassification(VIT)).size == (1, 16, 16)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_a_folder_of_timm(safe: bool, tmp_path: Path) -> None:
    original = timm.create_model("resnet10t", num_classes=4, in_chans=1).eval()
    cfg = {"mean": (0.1,), "std": (0.2,), "input_size": (1, 64, 64)}
    save_for_hf(
        original, tmp_path, model_config={"pretrained_cfg": cfg}, model_args={"in_chans": 1}, safe_serialization=safe
    )
    original.pretrained_cfg = {**original.pretrained_cfg, **cfg}
    changed(tmp_path, pretrained_cfg={**original.pretrained_cfg, **cfg})
    source = load_source(str(tmp_path))
    x = torch.randn(2, 1, 64, 64)
    assert source.module.training and torch.equal(source.module.eval()(x), original(x))
    assert (source.input_size, source.wanted_normalisation) == ((1, 64, 64), ((0.1,), (0.2,)))
    other = load_source(f"{tmp_path}?num_classes=7")
    assert other.module.num_classes == 7 and other.wanted_normalisation is None and "num_classes=7" in other.notes[0]


def test_older_pickles_go_through_our_own_reader(bert: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, original = bert
    (folder / "model.safetensors").unlink()
    torch.save(original.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load_source(str(folder)).module.eval()(IDS).logits, original(IDS).logits)

    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({**original.state_dict(), "more": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError):
        load_source(str(folder))
    assert not (tmp_path / "ran").exists()


def test_nothing_in_a_configuration_chooses_code(bert: tuple[Path, nn.Module]) -> None:
    folder, original = bert
    changed(
        folder, auto_map={"AutoConfig": "evil.py--Evil"}, _attn_implementation="evil/kernel", attn_implementation="evil/kernel",
        use_kernels=True,
    )  # fmt: skip
    module = load_source(str(folder)).module
    assert torch.equal(module.eval()(IDS).logits, original(IDS).logits)
    assert module.config._attn_implementation == original.config._attn_implementation
    with pytest.raises(ConfigError, match="has no '_attn_implementation'"):
        load_source(f"{folder}?_attn_implementation=evil/kernel")
    assert not runs_code(parse_spec(f"{folder}?num_hidden_layers=1"))
    assert runs_code(parse_spec(f"{folder}?pretrained=True"))


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    del held["classifier.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_file(folder: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    next(folder.glob("model-00002-of-*")).unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lose_weights, "has no weights: none of model.safetensors"),
    "a tensor less": (lose_a_tensor, r"lacks 1 of the tensors of BertForSequenceClassification: classifier.weight\."),
    "cut off": (cut, "model.safetensors` is damaged"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is damaged"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "it holds no object"),
    "other sizes": (
        lambda folder: changed(folder, intermediate_size=16),
        r"6 of the tensors in .* have other shapes than config.json says: .*intermediate.dense.bias \(file \(32,\), model \(16,\)\)",
    ),
    "a file less": (lose_a_file, "model-00002-of-.*, which `model.safetensors.index.json` names, is missing"),
    "no class": (lambda folder: changed(folder, architectures=None), "`.*config.json` does not name the model's class"),
    "huge": (lambda folder: changed(folder, hidden_size=2_000_000), "many more elements than its weights have"),
    "of no sense": (lambda folder: changed(folder, num_attention_heads="x"), "damaged|cannot be loaded"),
    "own code": (
        lambda folder: changed(folder, architectures=["Own"], auto_map={}),
        "the class Own, .* brings code of its own, which is not run",
    ),
    "no model": (
        lambda folder: changed(folder, architectures=["AutoModel"]),
        "holds a model of the class AutoModel, which transformers",
    ),
    "quantised": (lambda folder: changed(folder, quantization_config={}), "holds quantised weights"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter of PEFT"),
    "diffusers": (
        lambda folder: (folder / "config.json").write_text('{"_class_name": "UNet"}'),
        "holds a UNet of diffusers",
    ),
    "another library": (lambda folder: (folder / "config.json").write_text("{}"), "holds a model of another library"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_read(name: str, bert: tuple[Path, nn.Module]) -> None:
    folder, _ = bert
    breaks, message = BROKEN[name]
    breaks(folder)
    with pytest.raises(ConfigError, match=message) as raised:
        load_source(str(folder))
    assert raised.value.hint and "\n" not in str(raised.value)


def test_wrong_arguments(bert: tuple[Path, nn.Module]) -> None:
    folder, _ = bert
    with pytest.raises(ConfigError, match=r"has no 'num_hiden_layers'\. Nearest: num_hidden_layers"):
        load_source(f"{folder}?num_hiden_layers=1")
    with pytest.raises(ConfigError, match="cannot be built with num_attention_heads=3: ValueError"):
        load_source(f"{folder}?num_attention_heads=3")


def test_paths_from_elsewhere(bert: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = bert
    monkeypatch.chdir(folder.parent)
    torch.save({}, "w.pt")
    assert absolute("bert?num_hidden_layers=1") == f"{folder}?num_hidden_layers=1"
    assert absolute("bert@w.pt?entry=ema") == f"{folder}@{folder.parent / 'w.pt'}?entry=ema"
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="There is no file or run directory `bert`"):
        load_source("bert")
