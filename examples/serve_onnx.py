"""Image in, label out: serving an exported student with onnxruntime and Pillow, and nothing else.

    python examples/serve_onnx.py student.onnx photo.jpg [more.png …] [--top 3]

Reads from the file itself what it needs: the input's size, whether it takes pixels (uint8, N x H x W x C, exported with
preprocessing built in) or normalised floats (N x C x H x W, with `mean` and `std` in the metadata), and the class names
(`classes`, a JSON list in the metadata).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


class Classifier:
    """A session, and what its file says about inputs and classes."""

    def __init__(self, path: Path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.input = self.session.get_inputs()[0]
        self.takes_pixels = self.input.type == "tensor(uint8)"
        self.classes = json.loads(self.metadata.get("classes", "[]"))

    def prepare(self, image: Image.Image) -> np.ndarray:
        """One image as a batch of one."""
        _, *rest = self.input.shape
        height, width, channels = rest if self.takes_pixels else (*rest[1:], rest[0])
        image = image.convert("L" if channels == 1 else "RGB")
        if isinstance(height, int) and isinstance(width, int):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8).reshape(1, image.height, image.width, -1)
        if self.takes_pixels:
            return pixels
        mean, std = (np.array(json.loads(self.metadata.get(key, "[]")) or empty, np.float32) for key, empty in _NEUTRAL)
        return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)

    def __call__(self, image: Image.Image, top: int = 1) -> list[tuple[str, float]]:
        """The likeliest classes and their probabilities."""
        scores = self.session.run(None, {self.input.name: self.prepare(image)})[0][0].astype(np.float64)
        odds = np.exp(scores - scores.max())
        best = np.argsort(-odds)[:top]
        names = [self.classes[i] if i < len(self.classes) else f"class {i}" for i in best]
        return [(name, float(odds[i] / odds.sum())) for name, i in zip(names, best, strict=True)]


_NEUTRAL = (("mean", [0.0]), ("std", [1.0]))


def main() -> None:
    """Label the images named on the command line."""
    parser = argparse.ArgumentParser(description="Label images with an exported student.")
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--top", type=int, default=1)
    options = parser.parse_args()
    classify = Classifier(options.model)
    for path in options.images:
        with Image.open(path) as image:
            answers = classify(image, options.top)
        print(f"{path}: " + ", ".join(f"{label} ({share:.1%})" for label, share in answers))


if __name__ == "__main__":
    main()
