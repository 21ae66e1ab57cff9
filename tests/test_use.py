"""`use` only affects its own block: of a thread, of a task, around or inside compiled code.

The implementations here are the reference under other names, which record what runs.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.implementations import reference, registry
from polyce.implementations.contract import Implementation
from torch_graphs import FORWARD, Graphs

LOGITS = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], dtype=np.float32)
LABELS = np.array([2, 0], dtype=np.int32)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a, b and c into the table, of which a is the default; list what ran."""
    found: list[str] = []

    def fake(name: str) -> Implementation:
        def cross_entropy(*args: Any) -> Any:
            found.append(name)
            return reference.cross_entropy(*args)

        return dataclasses.replace(reference.PATH, name=name, cross_entropy=cross_entropy)

    monkeypatch.setattr(registry, "TABLE", (*map(fake, "abc"), *registry.TABLE))
    return found


def call() -> None:
    polyce.cross_entropy(LOGITS, LABELS)


async def hold(name: str, entered: asyncio.Event, go_on: asyncio.Event) -> None:
    """Call inside a block, before and after another task has run."""
    with polyce.use(name):
        call()
        entered.set()
        await go_on.wait()
        call()


@pytest.mark.only("numpy")
@pytest.mark.parametrize("first_to_leave", ["b", "c"])
def test_each_task_has_its_own(ran: list[str], first_to_leave: str) -> None:
    async def main() -> None:
        leave = {"b": asyncio.Event(), "c": asyncio.Event()}
        entered = {"b": asyncio.Event(), "c": asyncio.Event()}
        tasks = {name: asyncio.create_task(hold(name, entered[name], leave[name])) for name in "bc"}
        await asyncio.gather(*(event.wait() for event in entered.values()))
        call()
        last = "c" if first_to_leave == "b" else "b"
        for name in (first_to_leave, last):
            leave[name].set()
            await tasks[name]
            call()

    asyncio.run(main())
    last = "c" if first_to_leave == "b" else "b"
    assert ran == ["b", "c", "a", first_to_leave, "a", last, "a"]
    call()
    assert ran[-1] == "a"


@pytest.mark.only("numpy")
def test_a_task_has_the_choice_of_the_block_it_was_made_in(ran: list[str]) -> None:
    async def main() -> None:
        with polyce.use("b"):
            task = asyncio.create_task(asyncio.sleep(0))
            of_block = asyncio.create_task(asyncio.to_thread(call))
        await task
        await of_block
        call()

    asyncio.run(main())
    assert ran == ["b", "a"]


@pytest.mark.only("numpy")
def test_a_block_may_end_in_another_context(ran: list[str]) -> None:
    """The block of an asynchronous generator does so if nothing runs the generator to its end."""

    def blocks() -> Iterator[None]:
        with polyce.use("b"):
            yield

    open_block = blocks()
    contextvars.copy_context().run(next, open_block)
    call()
    open_block.close()
    call()
    assert ran == ["a", "a"]


@pytest.mark.only("numpy")
def test_threads_that_overlap(ran: list[str]) -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with polyce.use("c"):
            inside.set()
            done.wait(60)
            call()

    thread = threading.Thread(target=other)
    with polyce.use("b"):
        thread.start()
        assert inside.wait(60)
        call()
    done.set()
    thread.join()
    call()
    assert ran == ["b", "c", "a"]


@pytest.mark.only("jax-x32")
def test_around_and_inside_a_jit(ran: list[str]) -> None:
    import jax

    arrays = jax.numpy.asarray(LOGITS), jax.numpy.asarray(LABELS)
    with polyce.use("b"):
        jax.jit(partial(polyce.cross_entropy))(*arrays)

    def inside(*given: Any) -> Any:
        with polyce.use("b"), polyce.use("c"):
            return polyce.cross_entropy(*given)

    jax.jit(inside)(*arrays)
    jax.jit(partial(polyce.cross_entropy, reduction="sum"))(*arrays)
    assert ran == ["b", "c", "a"]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """A compiler that records the kernels in its graphs, with a fresh cache."""
    import torch

    torch._dynamo.reset()
    yield Graphs(torch)
    torch._dynamo.reset()


def compiled(function: Any, graphs: Graphs) -> Any:
    import torch

    return torch.compile(function, fullgraph=True, backend=graphs)


def tensors(rows: int = 4) -> tuple[Any, Any]:
    import torch

    return torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.int64)


@pytest.mark.only("torch")
def test_around_a_function_that_torch_compiles(graphs: Graphs) -> None:
    run = compiled(polyce.cross_entropy, graphs)
    with polyce.use("native"):
        run(*tensors())
        with polyce.use("reference"):
            run(*tensors())
        run(*tensors())
    run(*tensors())
    # One for native and one for the reference, which is the default for a small call; the graph
    # recompiled for None is the same.
    assert graphs.names == [[FORWARD], [], []]


@pytest.mark.only("torch")
def test_inside_a_function_that_torch_compiles(graphs: Graphs) -> None:
    def nested(*given: Any) -> Any:
        before = polyce.cross_entropy(*given)
        with polyce.use("native"):
            outer = polyce.cross_entropy(*given)
            with polyce.use("reference"):
                inner = polyce.cross_entropy(*given)
        return before, outer, inner, polyce.cross_entropy(*given)

    run = compiled(nested, graphs)
    losses = run(*tensors())
    assert graphs.names == [[FORWARD]]
    assert [round(float(loss), 4) for loss in losses] == [1.0986] * 4
    # No effect is left, neither on calls nor on the compiler.
    assert "native     yes  <- runs" in str(polyce.explain(*tensors()))
    compiled(lambda *given: polyce.cross_entropy(*given, reduction="sum"), graphs)(*tensors())
    assert graphs.names[-1] == []


@pytest.mark.only("torch")
def test_inside_and_around_at_once(graphs: Graphs) -> None:
    def inside(*given: Any) -> Any:
        with polyce.use("reference"):
            inner = polyce.cross_entropy(*given)
        return inner, polyce.cross_entropy(*given, reduction="sum")

    run = compiled(inside, graphs)
    with polyce.use("native"):
        run(*tensors())
        assert polyce.explain(*tensors()).chosen == "native"
    assert graphs.names == [[FORWARD]]


@pytest.mark.only("torch")
def test_a_graph_that_breaks_inside_a_block(ran: list[str]) -> None:
    import torch

    torch._dynamo.reset()

    def breaks(*given: Any) -> Any:
        with polyce.use("b"):
            torch._dynamo.graph_break()
            return polyce.cross_entropy(*given)

    torch.compile(breaks, backend="eager")(*tensors())
    polyce.cross_entropy(*tensors())
    # torch runs the operator twice, first without values, for the shape of its result.
    assert ran == ["b", "b", "a"]
    torch._dynamo.reset()
