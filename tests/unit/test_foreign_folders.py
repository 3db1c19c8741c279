"""Folders as other programs leave them: the model computes what its own library computes, or there is an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from torch import nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.loading.load import load_source
from indistill_fx.loading.spec import parse_spec
from indistill_fx.runs.load import about, load_run
from indistill_fx.runs.signature import is_signed, sign
from indistill_fx.system.files import save_json
from indistill_fx.system.tensor_files import save_tensors

IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
WEIGHT = "bert.encoder.layer.0.output.dense.weight"


def saved(model: Any, folder: Path) -> nn.Module:
    """Written by its own library, with weights that no initialisation gives."""
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape))
    model.save_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]


@pytest.fixture
def bert(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))
    return tmp_path / "bert", saved(model, tmp_path / "bert")


def answers(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(IDS).logits  # type: ignore[no-any-return]


CALLED_LIKE_CODE = {
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, attn_pdrop=0.0),
    "gemma2": transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, attn_logit_softcapping=0.5),
}


@pytest.mark.parametrize("name", CALLED_LIKE_CODE)
def test_entries_that_are_called_like_those_that_choose_code(name: str, tmp_path: Path) -> None:
    kind = {"gpt2": transformers.GPT2LMHeadModel, "gemma2": transformers.Gemma2ForCausalLM}[name]
    original: Any = saved(kind(CALLED_LIKE_CODE[name]), tmp_path)
    module: Any = load_source(str(tmp_path)).module
    assert torch.equal(answers(module), answers(original))
    assert module.config.to_dict() | {"_name_or_path": ""} == original.config.to_dict() | {"_name_or_path": ""}


def test_names_of_older_pickles(bert: tuple[Path, nn.Module]) -> None:
    folder, original = bert
    (folder / "model.safetensors").unlink()
    older = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in original.state_dict().items()
    }
    torch.save({**older, "bert.embeddings.position_ids": torch.arange(512)[None]}, folder / "pytorch_model.bin")
    assert torch.equal(answers(load_source(str(folder)).module), answers(original))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_rounded_weights_are_refused(safe: bool, kind: torch.dtype, bert: tuple[Path, nn.Module]) -> None:
    folder, _ = bert
    held = load_file(folder / "model.safetensors")
    held[WEIGHT] = held[WEIGHT].to(kind)
    (folder / "model.safetensors").unlink()
    if safe:
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=f"holds quantised weights .{WEIGHT}."):
        load_source(str(folder))


def test_weights_do_not_follow_the_file(bert: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, original = bert
    module = load_source(str(folder)).module
    other = {key: value + 1 for key, value in original.state_dict().items()}
    save_file(other, tmp_path / "other", metadata={"format": "pt"})
    shutil.copy(tmp_path / "other", folder / "model.safetensors")  # into the same file
    assert torch.equal(answers(module), answers(original))


def test_weights_that_a_pickle_keeps_in_one_place(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    saved(transformers.LlamaForCausalLM(config), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")
    module: Any = load_source(str(tmp_path)).module
    with torch.no_grad():
        module.lm_head.weight.zero_()
    assert module.model.embed_tokens.weight.any()


def test_arguments_as_transformers_takes_them(bert: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, _ = bert
    assert answers(load_source(f"{folder}?num_labels=5&num_hidden_layers=1").module).shape == (3, 5)
    saved(transformers.GPT2LMHeadModel(CALLED_LIKE_CODE["gpt2"]), tmp_path / "gpt2")
    small: Any = load_source(f"{tmp_path / 'gpt2'}?num_hidden_layers=1")
    assert len(small.module.transformer.h) == 1 and "num_hidden_layers=1" in small.notes[0]
    saved(transformers.Gemma2ForCausalLM(CALLED_LIKE_CODE["gemma2"]), tmp_path / "gemma2")
    for layers in (1, 3):  # the configuration lists what each of the layers is
        deep: Any = load_source(f"{tmp_path / 'gemma2'}?num_hidden_layers={layers}").module
        assert len(deep.model.layers) == len(deep.config.layer_types) == layers


def test_entries_of_a_configuration_in_a_configuration(tmp_path: Path) -> None:
    text, vision = {**SIZES, "max_position_embeddings": 16}, {**SIZES, "image_size": 16, "patch_size": 8}
    del vision["vocab_size"]
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    saved(transformers.CLIPModel(config), tmp_path)
    module: Any = load_source(f'{tmp_path}?text_config={{"num_hidden_layers":1}}').module
    assert len(module.text_model.encoder.layers) == 1 and module.config.text_config.hidden_size == 16
    with pytest.raises(
        ConfigError, match=r"has no 'num_layers' in 'text_config'\. Nearest: num_labels, num_hidden_layers"
    ):
        load_source(f'{tmp_path}?text_config={{"num_layers":1}}')


def test_what_is_known_of_images_with_another_configuration(tmp_path: Path) -> None:
    names = {0: "cat", 1: "dog", 2: "owl"}
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, id2label=names)
    saved(transformers.ViTForImageClassification(config), tmp_path)
    assert load_source(str(tmp_path)).classes == ("cat", "dog", "owl")
    other = load_source(f"{tmp_path}?image_size=8&num_labels=2")
    assert (other.input_size, other.wanted_size, other.classes) == ((3, 8, 8), (8, 8), ())


def test_class_names_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=2)
    save_for_hf(model, tmp_path, model_config={"label_names": ["cat", "dog"]})
    assert load_source(str(tmp_path)).classes == ("cat", "dog")
    assert load_source(f"{tmp_path}?num_classes=3").classes == ()


@pytest.fixture
def run(bert: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    """A run whose student is the folder's model with one layer."""
    spec = f"{bert[0]}?num_hidden_layers=1"
    (tmp_path / "run").mkdir()
    save_json(tmp_path / "run/run.json", {"about": about(spec, "texts", (7,), IDS)})
    save_tensors(tmp_path / "run/student.safetensors", load_source(spec).module.state_dict())
    return tmp_path / "run"


def test_a_run_needs_the_configuration_alone(run: Path, bert: tuple[Path, nn.Module]) -> None:
    folder, _ = bert
    (folder / "model.safetensors").unlink()
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**held, "transformers_version": "5.0.0"}))
    source = load_run(run)
    assert source.notes == ()  # its weights are not new
    weights = load_file(run / "student.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in source.module.state_dict().items())


def test_a_run_whose_folder_is_another_now(run: Path, bert: tuple[Path, nn.Module]) -> None:
    folder, _ = bert
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**held, "hidden_act": "relu"}))  # the weights fit that, too
    with pytest.raises(ConfigError, match=r"has another config\.json than when that run began"):
        load_run(run)
    moved = folder.rename(folder.with_name("moved"))
    with pytest.raises(
        ConfigError, match=r"is not there any more\..*FOLDER\?num_hidden_layers=1@.*student\.safetensors"
    ):
        load_run(run)
    with pytest.raises(ConfigError, match=f"There is no file or folder `{folder}`"):
        load_source(f"{folder}?num_hidden_layers=1")
    assert load_source(f"{moved}?num_hidden_layers=1@{run / 'student.safetensors'}").notes == ()


def test_a_written_student_of_transformers_may_be_moved(tmp_path: Path) -> None:
    code = "from transformers.modeling_outputs import SequenceClassifierOutput\nfrom torch import nn\n\nStudent = nn.Identity\n"
    there, here = tmp_path / "there/student.py", tmp_path / "here/student.py"
    for file in (there, here):
        file.parent.mkdir()
        file.write_text(code)
    spec = parse_spec(f"{there}:Student")
    assert is_signed(spec, proof := sign(spec), here)
    here.write_text(code.replace("torch", "torchy"))
    assert not is_signed(spec, proof, here)


def test_several_teachers_of_transformers(bert: tuple[Path, nn.Module]) -> None:
    folder, original = bert
    other = load_source(str(folder)).module
    with torch.no_grad():
        other.classifier.bias.add_(1)  # type: ignore[operator, union-attr]
    both = ifx.ensemble([original, other.eval()], weights=[3, 1], example_inputs={"input_ids": IDS})
    with torch.no_grad():
        assert torch.allclose(both(IDS), answers(original) + 0.25, atol=1e-5)
