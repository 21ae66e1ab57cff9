"""Export polyce's loss and gradient as an ONNX model, for any number of rows.

ndonnx arrays without values record what is done to them; the model then runs wherever ONNX does,
with no Python and no polyce. Needs `pip install ndonnx onnx onnxruntime`.
"""

from __future__ import annotations

import ndonnx
import numpy as np
import onnxruntime

import polyce

CLASSES = 4

# "N" is any number of rows; the number of classes has to be known.
logits = ndonnx.argument(shape=("N", CLASSES), dtype=ndonnx.float32)
labels = ndonnx.argument(shape=("N",), dtype=ndonnx.int64)
weight = ndonnx.argument(shape=(CLASSES,), dtype=ndonnx.float32)

loss, grad = polyce.cross_entropy_with_grad(
    logits, labels, weight, ignore_index=-1, label_smoothing=0.1
)
model = ndonnx.build(
    {"logits": logits, "labels": labels, "weight": weight}, {"loss": loss, "grad": grad}
)
session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"]
)

rng = np.random.default_rng(1)
for rows in (1, 3, 1000):
    inputs = {
        "logits": rng.normal(0.0, 3.0, (rows, CLASSES)).astype(np.float32),
        "labels": rng.integers(-1, CLASSES, rows),
        "weight": np.array([0.5, 1.0, 2.0, 1.5], dtype=np.float32),
    }
    in_onnx, grad_in_onnx = session.run(["loss", "grad"], inputs)
    in_numpy, grad_in_numpy = polyce.cross_entropy_with_grad(
        *inputs.values(), ignore_index=-1, label_smoothing=0.1
    )
    np.testing.assert_allclose(in_onnx, in_numpy, rtol=1e-6)
    np.testing.assert_allclose(grad_in_onnx, grad_in_numpy, rtol=1e-5, atol=1e-7)
    print(f"{rows:5} rows: loss {in_onnx:.6f} in onnxruntime, {in_numpy:.6f} with NumPy")
print(f"{len(model.graph.node)} nodes, {len(model.SerializeToString())} bytes")
