"""A graph with Kokoro's inputs and outputs, whose phonemes last three frames each."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

FRAMES, SAMPLES = 3, 600


def write_kokoro(directory: Path, packs: Mapping[str, float]) -> Path:
    """A directory of the stand-in, and of voice packs whose styles are all of one level."""
    stand_in(directory / "kokoro-test.onnx")
    styles = {name: np.full((510, 1, 256), level, np.float32) for name, level in packs.items()}
    np.savez_compressed(directory / "voices-test.npz", **styles)
    return directory


def stand_in(path: Path, tensor: str = "/encoder/Clip_output_0") -> None:
    """A graph that gives as much audio as its tokens last: a constant tone of the style's mean."""
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    number, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    constants = [
        onnx.numpy_helper.from_array(np.array(FRAMES, np.float32), "frames"),
        onnx.numpy_helper.from_array(np.array([FRAMES * SAMPLES], np.int64), "samples"),
        onnx.numpy_helper.from_array(np.array([1], np.int64), "one"),
    ]
    nodes = [
        node("Cast", ["tokens"], ["numbers"], to=number),
        node("Mul", ["numbers", "zero"], ["nothing"]),
        node("Add", ["nothing", "frames"], ["each"]),
        node("Squeeze", ["each", "first"], [tensor]),
        node("Shape", [tensor], ["count"]),
        node("Mul", ["count", "samples"], ["length"]),
        node("ReduceMean", ["style"], ["mean"], keepdims=0),
        node("Expand", ["mean", "length"], ["audio"]),
    ]
    constants += [
        onnx.numpy_helper.from_array(np.array(0, np.float32), "zero"),
        onnx.numpy_helper.from_array(np.array([0], np.int64), "first"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "stand-in",
        [
            value("tokens", whole, [1, "tokens"]),
            value("style", number, [1, 256]),
            value("speed", number, [1]),
        ],
        [value("audio", number, ["samples"])],
        constants,
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
