"""jax: calls compiled for a GPU without one; what they store, and the digits of their products."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import polyce

pytestmark = pytest.mark.only("jax-compile")

# What XLA's plugin has to know of an H100; its drivers and libraries are not asked.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100"
"""
# Enough classes to make the per-row numbers small compared with the logits.
ROWS, CLASSES, FEATURES = 512, 8192, 64
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"logit_softcap": 30.0, "z_loss": 1e-4},
    "stats": {"return_stats": True},
}


@pytest.fixture(scope="module")
def compiled() -> Callable[..., Any]:
    """Compile a function of arrays, given by shape and dtype, for an H100."""
    import jax
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    place = jax.sharding.SingleDeviceSharding(found.devices[0])

    def compile_it(function: Any, *arrays: tuple[tuple[int, ...], str]) -> Any:
        shells = [jax.ShapeDtypeStruct(*array, sharding=place) for array in arrays]
        return jax.jit(function).lower(*shells).compile()

    return compile_it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_of_the_logits_size_is_stored_beside_the_gradient(
    compiled: Callable[..., Any], options: dict[str, Any], dtype: str
) -> None:
    import jax

    def loss(logits: Any, labels: Any) -> Any:
        return polyce.cross_entropy(logits, labels, **options)

    arrays = ((ROWS, CLASSES), dtype), ((ROWS,), "int32")
    has_stats = "return_stats" in options
    for function in (loss, jax.value_and_grad(loss, has_aux=has_stats)):
        program = compiled(function, *arrays)
        stored = program.memory_analysis().temp_size_in_bytes
        assert stored < 0.01 * 4 * ROWS * CLASSES
        # The program's own steps: the logits come in, and at most the gradient goes out.
        steps = program.as_text().partition("ENTRY")[2]
        large = re.findall(rf"= \(?\w+\[{ROWS},{CLASSES}\]", steps)
        assert len(large) == (1 if function is loss else 2)


def test_an_array_that_is_stored_would_be_noticed(compiled: Callable[..., Any]) -> None:
    import jax

    def loss(logits: Any, labels: Any) -> Any:
        logs = jax.lax.optimization_barrier(jax.nn.log_softmax(logits))
        return -jax.numpy.take_along_axis(logs, labels[:, None], axis=1).mean()

    program = compiled(loss, ((ROWS, CLASSES), "float32"), ((ROWS,), "int32"))
    assert program.memory_analysis().temp_size_in_bytes >= 4 * ROWS * CLASSES


def test_products_of_heads_keep_float32_s_digits(compiled: Callable[..., Any]) -> None:
    import jax

    def loss(hidden: Any, head: Any, labels: Any) -> Any:
        return polyce.linear_cross_entropy(hidden, head, labels)

    arrays = ((ROWS, FEATURES), "float32"), ((CLASSES, FEATURES), "float32"), ((ROWS,), "int32")
    program = compiled(jax.value_and_grad(loss, (0, 1)), *arrays).as_text()
    products = [line for line in program.splitlines() if re.search(r" dot\(|cublas\S*gemm", line)]
    assert len(products) >= 3
    for line in products:
        assert re.search("operand_precision={highest,highest}|HIGHEST.*HIGHEST", line), line
