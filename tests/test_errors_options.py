"""The errors about options that torch does not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce
from error_calls import X3, Bad, bad, check, floats, ints, table
from polyce.testing.backends import Backend

NAN, INF = float("nan"), float("inf")


@table(
    bad("sample_weight shape", "(3,)", "(4,)", sample_weight=floats(4)),
    bad("sample_weight shape", "(3,)", "()", sample_weight=floats()),
    bad("sample_weight shape", "(3,)", "(1,)", sample_weight=floats(1)),
    bad("sample_weight shape", "(3,)", "(3, 1)", sample_weight=floats(3, 1)),
    bad(
        "sample_weight shape", "(2, 4)", "(2, 1)",
        input=X3, target=ints(2, 4), sample_weight=floats(2, 1),
    ),
    bad("sample_weight dtype", "bool", sample_weight=np.ones(3, bool)),
    bad("sample_weight dtype", "complex64", sample_weight=np.ones(3, np.complex64)),
    bad("no array", "sample_weight", "list", sample_weight=[1.0] * 3),
    bad("no array", "sample_weight", "float", sample_weight=1.0),
)  # fmt: skip
def test_sample_weight(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@table(
    bad("normalizer reduction", "'sum'", normalizer=2.0, reduction="sum"),
    bad("normalizer reduction", "'none'", normalizer=floats(), reduction="none"),
    bad("normalizer shape", "(1,)", normalizer=floats(1)),
    bad("normalizer shape", "(3,)", normalizer=floats(3)),
    bad("normalizer dtype", "bool", normalizer=np.ones((), bool)),
    bad("normalizer number", "True", normalizer=True),
    bad("normalizer number", "1j", normalizer=1j),
    bad("no array", "normalizer", "str", normalizer="3"),
)
def test_normalizer(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@table(
    bad("z_loss", "str", z_loss="0.1"),
    bad("z_loss", "bool", z_loss=True),
    bad("z_loss", "NoneType", z_loss=None),
    bad("z_loss", "", z_loss=floats()),
    bad("z_loss range", "-0.1", z_loss=-0.1),
    bad("z_loss range", "nan", z_loss=NAN),
    bad("z_loss range", "inf", z_loss=INF),
    bad("scale", "logit_scale", "str", logit_scale="2"),
    bad("scale", "logit_scale", "", logit_scale=np.full((), 2, np.float32)),
    bad("scale", "logit_scale", "bool", logit_scale=True),
    bad("scale", "logit_softcap", "", logit_softcap=np.full((), 30, np.float32)),
    bad("scale range", "logit_scale", "0", logit_scale=0),
    bad("scale range", "logit_scale", "-1.0", logit_scale=-1.0),
    bad("scale range", "logit_scale", "nan", logit_scale=NAN),
    bad("scale range", "logit_scale", "inf", logit_scale=INF),
    bad("scale range", "logit_scale", "1e+39", logit_scale=1e39),
    bad("scale range", "logit_scale", "1e-46", logit_scale=1e-46),
    bad("scale range", "logit_softcap", "3.4e+38", logit_softcap=3.4e38),
    bad("scale range", "logit_softcap", "1e-40", logit_softcap=1e-40),
    bad("scale range", "logit_softcap", "0.0", logit_softcap=0.0),
    bad("scale range", "logit_softcap", "-30", logit_softcap=-30),
    bad("scale range", "logit_softcap", "inf", logit_softcap=INF),
    bad("stats", "'accuracy'", return_stats="accuracy"),
    bad("stats", "'lsE'", return_stats=("entropy", "lsE")),
    bad("stats", "1", return_stats=(1,)),
    bad("stats kind", "None", return_stats=None),
    bad("stats kind", "1", return_stats=1),
    bad("stats kind", "{'lse'}", return_stats={"lse"}),
)
def test_options(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@pytest.mark.parametrize("name", ["nll_loss", "NLLLoss"])
@pytest.mark.parametrize("option", ["z_loss", "logit_scale", "logit_softcap", "return_stats"])
def test_log_probabilities_take_no_option_of_logits(
    backend: Backend, name: str, option: str
) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        getattr(polyce, name)(**{option: 1.0})


@pytest.mark.only("torch", "jax-x32", "jax-x64")
@pytest.mark.parametrize("option", ["logit_scale", "logit_softcap", "z_loss"])
def test_an_option_that_is_learned_says_what_to_do(backend: Backend, option: str) -> None:
    learned: Any = backend.asarray(np.full((), 2.0, np.float32))
    logits, labels = backend.asarray(floats(2, 3)), backend.asarray(ints(2))
    with pytest.raises(TypeError, match=f"{option} must be a real number, got"):
        polyce.cross_entropy(logits, labels, **{option: learned})
    if option == "logit_scale":
        with pytest.raises(TypeError, match="multiplies the logits before the call"):
            polyce.cross_entropy(logits, labels, logit_scale=learned)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_with_grad", "nll_loss"])
def test_dim_is_called_axis_here(backend: Backend, name: str) -> None:
    logits, labels = backend.asarray(floats(2, 3)), backend.asarray(ints(2))
    calls = {
        name: lambda: getattr(polyce, name)(logits, labels, dim=1),
        "log_softmax": lambda: polyce.log_softmax(logits, dim=1),
        "CrossEntropyLoss": lambda: polyce.CrossEntropyLoss(dim=1),
        "NLLLoss": lambda: polyce.NLLLoss(dim=1),
        "explain": lambda: polyce.explain(logits, labels, dim=1),
    }
    if backend.name == "torch":
        calls |= {
            "torch": lambda: polyce.torch.cross_entropy(logits, labels, dim=1),
            "module": lambda: polyce.torch.CrossEntropyLoss(dim=1),
            "nll module": lambda: polyce.torch.NLLLoss(dim=1),
        }
    for call in calls.values():
        with pytest.raises(TypeError, match=r"^dim is not an argument, the class axis is axis="):
            call()
