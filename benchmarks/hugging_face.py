"""Hugging Face's `transformers`: tiny models of many families, with random weights, through trace, shrink, student.py and ONNX.

    python benchmarks/hugging_face.py run benchmarks/results/hugging_face.json              all (a quarter of an hour)
    python benchmarks/hugging_face.py run FILE --only llama bert
    python benchmarks/hugging_face.py table benchmarks/results/hugging_face.json --into docs/coverage.md

Biases, norms' weights and batch norms' statistics are random. For each model: the graph's outputs on three texts of other tokens and
paddings (or images) beside the module's; `shrink` to half of every width, which compares the result with the original without these
channels; `student.py` against the smaller graph, to the bit; the whole model as ONNX, compared by `export_onnx`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from every_step import every_step, without_neutral_values, write_table
from torch import Tensor, nn

BEGIN, END = "<!-- hugging face: made by benchmarks/hugging_face.py table -->", "<!-- hugging face: end -->"
Inputs = Callable[[int], dict[str, Tensor]]
LENGTH, WIDTH = 12, 32

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "vocab_size": 100, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**TEXT, **ENDS, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
BOTH = {
    **ENDS, "vocab_size": 100, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 100,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VIT = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8,
}  # fmt: skip
FOUR = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
SMALL = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
HEADS = {**SMALL, "num_attention_heads": [1, 2, 3, 4]}
WINDOWS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
SOUND = {
    **{key: value for key, value in TEXT.items() if key != "max_position_embeddings"}, "conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}  # fmt: skip
WHISPER = {
    **BOTH,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "decoder_start_token_id": 1,
}


def ids(rows: int, length: int = LENGTH) -> Tensor:
    """Token numbers without those of the ends."""
    return torch.randint(5, 95, (rows, length))


def text(rows: int) -> dict[str, Tensor]:
    """Texts of several lengths, padded."""
    mask = torch.arange(LENGTH) < LENGTH - 3 * (torch.arange(rows)[:, None] % 3)
    return {"input_ids": ids(rows), "attention_mask": mask.long()}


def tokens(rows: int) -> dict[str, Tensor]:
    """Texts of one length, for models that take no mask."""
    return {"input_ids": ids(rows)}


def ended(rows: int) -> dict[str, Tensor]:
    """Texts that end once."""
    return {"input_ids": torch.cat([ids(rows, LENGTH - 1), torch.full((rows, 1), 2)], 1)}


def pairs(rows: int) -> dict[str, Tensor]:
    """Texts, and what the decoder reads."""
    return {**text(rows), "decoder_input_ids": ids(rows, 6)}


def image(side: int) -> Inputs:
    """Images of three channels."""
    return lambda rows: {"pixel_values": torch.randn(rows, 3, side, side)}


def video(rows: int) -> dict[str, Tensor]:
    """Clips of four frames."""
    return {"pixel_values": torch.randn(rows, 4, 3, 32, 32)}


def sound(rows: int) -> dict[str, Tensor]:
    """Waves."""
    return {"input_values": torch.randn(rows, 800)}


def mels(rows: int) -> dict[str, Tensor]:
    """Spectrograms for an encoder."""
    return {"input_features": torch.randn(rows, 8, 40)}


def boxed(rows: int) -> dict[str, Tensor]:
    """Texts with the place of every token on the page."""
    return {**tokens(rows), "bbox": torch.randint(0, 60, (rows, LENGTH, 2)).sort(-1).values.repeat(1, 1, 2)}


MODELS: dict[str, tuple[str, str, Inputs, dict[str, Any]]] = {
    "bert": ("Bert", "ForSequenceClassification", text, TEXT),
    "bert, masked words": ("Bert", "ForMaskedLM", text, TEXT),
    "bert, questions": ("Bert", "ForQuestionAnswering", text, {**TEXT, "num_labels": 2}),
    "roberta": ("Roberta", "ForSequenceClassification", text, TEXT),
    "xlm-roberta, tokens": ("XLMRoberta", "ForTokenClassification", text, TEXT),
    "distilbert": (
        "DistilBert",
        "ForSequenceClassification",
        text,
        {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "albert": ("Albert", "ForSequenceClassification", text, {**TEXT, "embedding_size": 16}),
    "electra": ("Electra", "ForSequenceClassification", text, {**TEXT, "embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2",
        "ForSequenceClassification",
        text,
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "max_relative_positions": 16,
        },
    ),
    "mpnet": ("MPNet", "ForSequenceClassification", text, TEXT),
    "mobilebert": (
        "MobileBert",
        "ForSequenceClassification",
        text,
        {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "squeezebert": ("SqueezeBert", "ForSequenceClassification", text, {**TEXT, "embedding_size": 32}),
    "funnel": (
        "Funnel",
        "ForSequenceClassification",
        text,
        {"vocab_size": 100, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    ),
    "longformer": ("Longformer", "ForSequenceClassification", text, {**TEXT, "attention_window": 4}),
    "fnet": ("FNet", "ForSequenceClassification", tokens, TEXT),
    "modernbert": (
        "ModernBert",
        "ForSequenceClassification",
        text,
        {**TEXT, **ENDS, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "layoutlm": ("LayoutLM", "ForTokenClassification", boxed, {**TEXT, "max_2d_position_embeddings": 64}),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        text,
        {**ENDS, "vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt-neo": (
        "GPTNeo",
        "ForCausalLM",
        text,
        {
            **TEXT,
            **ENDS,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", text, {**TEXT, **ENDS}),
    "opt": ("OPT", "ForCausalLM", text, {**TEXT, **ENDS, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", "ForCausalLM", text, {**ENDS, "vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    **{
        name.lower(): (name, "ForCausalLM", text, DECODER)
        for name in "Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Phi3 Olmo2 StableLm Phi SmolLM3 Granite Cohere Starcoder2".split()
    },
    "llama, classes": ("Llama", "ForSequenceClassification", text, DECODER),
    "mixtral": ("Mixtral", "ForCausalLM", text, {**DECODER, "num_local_experts": 4}),
    "mamba": (
        "Mamba",
        "ForCausalLM",
        tokens,
        {**ENDS, "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "rwkv": ("Rwkv", "ForCausalLM", tokens, {**ENDS, "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}),
    "t5": ("T5", "ForConditionalGeneration", pairs, T5),
    "t5, encoder": ("T5", "EncoderModel", text, T5),
    "bart": ("Bart", "ForSequenceClassification", ended, BOTH),
    "marian": ("Marian", "MTModel", pairs, {**BOTH, "decoder_vocab_size": 100}),
    "vit": ("ViT", "ForImageClassification", image(32), VIT),
    "deit": ("DeiT", "ForImageClassification", image(32), VIT),
    "beit": ("Beit", "ForImageClassification", image(32), VIT),
    "dinov2": ("Dinov2", "ForImageClassification", image(32), {**VIT, "mlp_ratio": 2}),
    "swin": ("Swin", "ForImageClassification", image(32), WINDOWS),
    "swinv2": ("Swinv2", "ForImageClassification", image(32), WINDOWS),
    "convnext": ("ConvNext", "ForImageClassification", image(64), FOUR),
    "convnextv2": ("ConvNextV2", "ForImageClassification", image(64), FOUR),
    "resnet": ("ResNet", "ForImageClassification", image(64), {**FOUR, "embedding_size": 16}),
    "regnet": ("RegNet", "ForImageClassification", image(64), {**FOUR, "embedding_size": 16, "groups_width": 8}),
    "bit": (
        "Bit",
        "ForImageClassification",
        image(64),
        {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "embedding_size": 16, "num_groups": 4},
    ),
    "mobilenet-v2": ("MobileNetV2", "ForImageClassification", image(64), {"depth_multiplier": 0.35}),
    "efficientnet": (
        "EfficientNet",
        "ForImageClassification",
        image(64),
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 64},
    ),
    "mobilevit": (
        "MobileViT",
        "ForImageClassification",
        image(64),
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 16, 24, 24, 24, 48], "image_size": 64},
    ),
    "segformer": (
        "Segformer",
        "ForSemanticSegmentation",
        image(64),
        {"num_attention_heads": [1, 2, 4, 8], **FOUR, "decoder_hidden_size": 16},
    ),
    "pvt": ("Pvt", "ForImageClassification", image(64), {**HEADS, "image_size": 64}),
    "poolformer": ("PoolFormer", "ForImageClassification", image(64), SMALL),
    "levit": (
        "Levit",
        "ForImageClassification",
        image(64),
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "dpt": (
        "DPT",
        "ForDepthEstimation",
        image(32),
        {
            **VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 24, 32],
            "fusion_hidden_size": 16,
            "reassemble_factors": [4, 2, 1, 0.5],
        },
    ),
    "yolos": ("Yolos", "ForObjectDetection", image(32), {**VIT, "image_size": [32, 32], "num_detection_tokens": 6}),
    "clip, images": ("CLIPVision", "ModelWithProjection", image(32), {**VIT, "projection_dim": 16}),
    "videomae": ("VideoMAE", "ForVideoClassification", video, {**VIT, "patch_size": 16, "num_frames": 4}),
    "timesformer": ("Timesformer", "ForVideoClassification", video, {**VIT, "patch_size": 16, "num_frames": 4}),
    "wav2vec2": ("Wav2Vec2", "ForSequenceClassification", sound, {**SOUND, "classifier_proj_size": 16}),
    "hubert": ("Hubert", "ForCTC", sound, SOUND),
    "whisper": (
        "Whisper",
        "ForConditionalGeneration",
        lambda rows: {**mels(rows), "decoder_input_ids": ids(rows, 6)},
        WHISPER,
    ),
    "whisper, classes": ("Whisper", "ForAudioClassification", mels, WHISPER),
    "patchtst": (
        "PatchTST",
        "ForPrediction",
        lambda rows: {"past_values": torch.randn(rows, 32, 3)},
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 32,
            "ffn_dim": 64,
            "prediction_length": 4,
        },
    ),
}
"""Name -> family, what follows it in the class's name, its inputs, its configuration."""


def build(name: str) -> nn.Module:
    """The model in eval mode; nothing in it has a neutral start value."""
    family, head, _, settings = MODELS[name]
    torch.manual_seed(0)
    return without_neutral_values(getattr(hf, f"{family}{head}")(getattr(hf, f"{family}Config")(**settings)))


def one(name: str) -> dict[str, Any]:
    """Every step of one model."""
    model, inputs = build(name), MODELS[name][2]
    torch.manual_seed(1)
    return every_step(model, inputs(2), inputs(3))


def run(options: argparse.Namespace) -> None:
    """All models, or some; the file is written after each."""
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    path = Path(options.file)
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    names = ("transformers", "torch", "indistill-fx", "onnxruntime")
    record |= {
        "versions": {key: version(key) for key in names},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    models = record.setdefault("models", {})
    for name in options.only or MODELS:
        models[name] = one(name)
        print(name, models[name], flush=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def table(options: argparse.Namespace) -> None:
    """The results as Markdown, in their place in a page."""
    record = json.loads(Path(options.file).read_text())
    models: dict[str, dict[str, Any]] = record["models"]
    right = [row for row in models.values() if row.get("off", 1.0) < 1e-4]
    first = (
        f"Of {len(models)} models, {len(right)} are traced with the module's outputs on other tokens, paddings and images "
        f"({sum(not row['leaves'] for row in right)} of them whole, without a part that stays one node)."
    )
    write_table(options.file, record, first, marks=(BEGIN, END), into=options.into)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("table", table)):
        command = commands.add_parser(name)
        command.set_defaults(call=function)
        command.add_argument("file")
        if name == "run":
            command.add_argument("--only", nargs="+", choices=MODELS)
        else:
            command.add_argument("--into")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
