"""Tensors that are refused, odd ones that are accepted, and labels that cannot be checked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import polyce

pytestmark = pytest.mark.only("torch")


@pytest.mark.parametrize("name", ["input", "target", "weight", "sample_weight", "normalizer"])
@pytest.mark.parametrize("odd", ["sparse", "nested", "quantised"])
def test_tensors_that_are_not_dense_are_refused_wherever_they_are(
    torch: Any, odd: str, name: str
) -> None:
    given = {
        "input": torch.zeros(2, 3),
        "target": torch.full((2, 3), 1 / 3),
        "weight": torch.ones(3),
        "sample_weight": torch.ones(2),
        "normalizer": torch.tensor(2.0),
    }
    dense = given[name]
    rule = "must be real" if odd == "quantised" else "must be a dense tensor"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that two of these are prototypes
        given[name] = {
            "sparse": dense.to_sparse,
            "nested": lambda: torch.nested.nested_tensor([dense, dense]),
            "quantised": lambda: torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        }[odd]()
        for function in (polyce.cross_entropy, polyce.cross_entropy_with_grad, polyce.explain):
            with pytest.raises(
                TypeError, match=f"^(a target of the logits' shape|{name}).* {rule}"
            ):
                function(**given)


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight", "normalizer"])
def test_devices_do_not_mix(torch: Any, name: str) -> None:
    given = {
        "input": torch.zeros(2, 3),
        "target": torch.tensor([0, 1]),
        "weight": torch.ones(3),
        "sample_weight": torch.ones(2),
        "normalizer": torch.tensor(2.0),
    }
    match = f"^all arrays must lie on one device.* and {name} on meta; move {name}"
    with pytest.raises(TypeError, match=match):
        polyce.cross_entropy(**(given | {name: given[name].to("meta")}))
    meta = {key: tensor.to("meta") for key, tensor in given.items()}
    with pytest.raises(TypeError, match=r"^all arrays must lie on one device"):
        polyce.cross_entropy(**(meta | {name: given[name]}))


@pytest.fixture
def one_process(torch: Any, tmp_path: Path) -> Any:
    """A process group of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield distributed
    distributed.destroy_process_group()


def test_sharded_tensors_are_refused_where_input_is_not_one(torch: Any, one_process: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    import polyce.torch

    mesh = one_process.init_device_mesh("cpu", (1,))
    given = {"input": torch.zeros(2, 3), "target": torch.tensor([0, 1]), "weight": torch.ones(3)}
    sharded = {name: distribute_tensor(a, mesh, [Shard(0)]) for name, a in given.items()}
    for name in ("target", "weight"):
        match = rf"^{name} must .* where input is one, got a DTensor; pass {name}\.full_tensor\(\)"
        for function in (polyce.nll_loss, polyce.cross_entropy, polyce.cross_entropy_with_grad):
            with pytest.raises(TypeError, match=match):
                function(**(given | {name: sharded[name]}))
    labels, group = given["target"], one_process.group.WORLD
    for function, more in (
        (polyce.explain, {}),
        (polyce.score, {}),
        (polyce.torch.cross_entropy, {"group": group}),
        (polyce.torch.cross_entropy, {"inplace_backward": True}),
    ):
        with pytest.raises(TypeError, match=r"^input must .* of one process for .*, got a DTensor"):
            function(sharded["input"], labels, **more)


def test_transforms_of_sharded_tensors_are_refused(torch: Any, one_process: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = one_process.init_device_mesh("cpu", (1,))
    labels = torch.tensor([0, 1])
    logits = distribute_tensor(torch.zeros(2, 3), mesh, [Shard(1)])
    for function in (
        lambda x: polyce.cross_entropy(x, labels),
        lambda x: polyce.nll_loss(x, labels),
        lambda x: polyce.log_softmax(x).sum(),
        lambda x: polyce.log_prob(x, labels).sum(),
        lambda x: polyce.entropy(x).sum(),
        lambda x: polyce.linear_cross_entropy(x, torch.ones(3, 3), labels),
        lambda x: polyce.linear_cross_entropy_with_grad(x, torch.ones(3, 3), labels)[0],
    ):
        with pytest.raises(ValueError, match="a backward pass only"):
            torch.func.grad(function)(logits)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
@pytest.mark.parametrize("name", ["input", "target", "weight", "sample_weight", "linear_weight"])
def test_masked_tensors_are_refused(torch: Any, name: str) -> None:
    import polyce.torch

    given = {
        "input": torch.zeros(2, 3),
        "target": torch.tensor([0, 1]),
        "weight": torch.ones(3),
        "sample_weight": torch.ones(2),
    }
    functions = [polyce.cross_entropy, polyce.cross_entropy_with_grad, polyce.nll_loss]
    functions += [polyce.explain, polyce.torch.cross_entropy]
    if name == "linear_weight":
        given["linear_weight"] = torch.ones(3, 3)
        functions = [polyce.linear_cross_entropy, polyce.linear_cross_entropy_with_grad]
    mask = torch.ones_like(given[name], dtype=torch.bool)
    masked = torch.masked.masked_tensor(given[name], mask)
    match = (
        rf"^{name} must be a plain tensor, got .*MaskedTensor, whose own meaning .*; "
        rf"pass {name}.get_data\(\), and mark rows to leave out with ignore_index$"
    )
    for function in functions:
        with pytest.raises(TypeError, match=match):
            function(**(given | {name: masked}))
    if name == "input":
        with pytest.raises(TypeError, match=match):
            polyce.log_softmax(masked)


def test_other_subclasses_go_on(torch: Any) -> None:
    class Own(torch.Tensor):
        pass

    x = torch.randn(6, 70, dtype=torch.float64, requires_grad=True)
    target = torch.randint(70, (6,))
    want = polyce.cross_entropy(x, target)
    got = polyce.cross_entropy(x.detach().as_subclass(Own), target)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want.detach())
    parameter = torch.nn.Parameter(x.detach())
    assert polyce.cross_entropy(parameter, target) == want


def test_bad_labels_under_vmap_give_nan(torch: Any) -> None:
    x, target = torch.zeros(2, 3, 4), torch.tensor([[0, 4, -1], [-100, 3, 9]])
    rows = torch.func.vmap(lambda x, t: polyce.cross_entropy(x, t, reduction="none"))(x, target)
    assert rows.isnan().tolist() == [[False, True, True], [False, False, True]]
    grads = torch.func.vmap(torch.func.grad(polyce.cross_entropy))(x, target)
    assert grads.isnan().any(2).tolist() == [[False, True, True], [False, False, True]]
