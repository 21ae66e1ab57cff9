"""ndonnx: loss and gradient as an ONNX model that takes any number of rows."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("ndonnx")

EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_export.py"
CLASSES = 5


def session_of(inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
    import ndonnx
    import onnx
    import onnxruntime

    model = ndonnx.build(inputs, outputs)
    onnx.checker.check_model(model, full_check=True)
    alone = onnxruntime.SessionOptions()
    alone.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), alone, providers=["CPUExecutionProvider"]
    )


def argument(shape: tuple[Any, ...], dtype: str) -> Any:
    import ndonnx

    return ndonnx.argument(shape=shape, dtype=getattr(ndonnx, dtype))


def there(stats: Any) -> dict[str, Any]:
    return {name: array for name, array in stats._asdict().items() if array is not None}


def check(kind: str, dtype: str, sizes: tuple[Any, ...], **options: Any) -> None:
    """Export with dynamic row sizes, run with several, and compare with NumPy."""
    axes = ("N", CLASSES, *("d1", "d2")[: len(sizes[0]) - 1])
    rows = (axes[0], *axes[2:])
    inputs = {
        "logits": argument(axes, "float32"),
        "target": argument(axes if kind == "probability" else rows, dtype),
        "weight": argument((CLASSES,), "float32"),
        "sample_weight": argument(rows, "float32"),
    }
    names = ("logits", "target", "weight")
    asked = polyce.Stats._fields[: 6 if kind == "probability" else 7]
    loss, grad, stats = polyce.cross_entropy_with_grad(
        *(inputs[name] for name in names),
        sample_weight=inputs["sample_weight"],
        return_stats=asked,
        **options,
    )
    outputs = {"loss": loss, "grad": grad} | there(stats)
    session = session_of(inputs, outputs)
    rng = np.random.default_rng(0)
    for size in sizes:
        shape = (size[0], CLASSES, *size[1:])
        target = rng.integers(0, CLASSES, size).astype(dtype)
        if kind == "probability":
            target = rng.dirichlet(np.ones(shape[0]), CLASSES).T.astype(dtype)
        given = {
            "logits": rng.normal(0.0, 3.0, shape).astype(np.float32),
            "target": target,
            "weight": rng.uniform(0.5, 2.0, CLASSES).astype(np.float32),
            "sample_weight": rng.integers(0, 3, size).astype(np.float32),
        }
        found = dict(zip(outputs, session.run(list(outputs), given), strict=True))
        with np.errstate(all="ignore"):
            want_loss, want_grad, want = polyce.cross_entropy_with_grad(
                *(given[name] for name in names),
                sample_weight=given["sample_weight"],
                return_stats=asked,
                **options,
            )
        for name, value in {"loss": want_loss, "grad": want_grad, **there(want)}.items():
            np.testing.assert_allclose(found[name], value, rtol=3e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_rows(reduction: str) -> None:
    sizes = ((7,), (1,), (1000,), (0,))
    check("index", "int64", sizes, reduction=reduction, label_smoothing=0.1, ignore_index=2)


def test_any_number_of_rows_of_probabilities() -> None:
    check("probability", "float32", ((7,), (64,)), label_smoothing=0.1)


def test_any_number_of_positions() -> None:
    check("index", "int32", ((2, 3, 4), (1, 5, 2)), z_loss=0.01, logit_softcap=10.0)


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_a_mean_over_rows_that_only_a_run_can_count(kind: str) -> None:
    """No uint8 label is -100, so all rows count, however many there will be."""
    logits = argument(("N", CLASSES), "float32")
    target = argument(("N",), "uint8") if kind == "index" else argument(("N", CLASSES), "float32")
    session = session_of(
        {"logits": logits, "target": target}, {"loss": polyce.cross_entropy(logits, target)}
    )
    rng = np.random.default_rng(0)
    for rows in (3, 300):
        x = rng.standard_normal((rows, CLASSES)).astype(np.float32)
        t = rng.integers(0, CLASSES, rows).astype(np.uint8) if kind == "index" else np.abs(x)
        (loss,) = session.run(None, {"logits": x, "target": t})
        np.testing.assert_allclose(loss, polyce.cross_entropy(x, t), rtol=1e-6)


def test_a_bad_label_is_nan_in_onnxruntime() -> None:
    logits, labels = argument(("N", CLASSES), "float32"), argument(("N",), "int64")
    loss, grad = polyce.cross_entropy_with_grad(logits, labels, reduction="none")
    session = session_of({"logits": logits, "labels": labels}, {"loss": loss, "grad": grad})
    given = {"logits": np.zeros((4, CLASSES), np.float32), "labels": np.array([0, 5, -1, -100])}
    loss, grad = session.run(None, given)
    np.testing.assert_allclose(loss, [np.log(5), np.nan, np.nan, 0], rtol=1e-6)
    assert np.isnan(grad).any(axis=1).tolist() == [False, True, True, False]


def test_the_number_of_classes_must_be_known() -> None:
    logits = argument(("N", "C"), "float32")
    with pytest.raises(ValueError, match=r"class axis of input must have .*\(None, None\); only"):
        polyce.cross_entropy(logits, argument(("N",), "int64"))


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))
    assert capsys.readouterr().out.count("in onnxruntime") == 3
