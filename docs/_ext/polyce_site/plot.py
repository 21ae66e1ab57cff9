"""The figure of the error against the margin, computed when the site is built."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

import polyce
from polyce.testing import exact_answer

ROWS, CLASSES, FARTHEST = 16, 10, 40
# A placeholder for the page's text colour until the drawing is done.
TEXT = "#010203"
# They differ in lightness too, and stand out on white and on black.
COLOURS = {"torch": "#d55e00", "polyce": "#2a83c9"}
STYLE = {
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.grid": True,
    "grid.color": TEXT,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "polyce",
    "font.family": "sans-serif",
    "font.size": 11,
}


def measure() -> dict[str, dict[str, Any]]:
    """Compute losses and relative errors of both at whole margins, the largest over some rows."""
    margins = np.arange(FARTHEST + 1)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((margins.size, ROWS, CLASSES)).astype(np.float32)
    ahead = logits[..., 1:].max(axis=-1).astype(np.float64) + margins[:, None]
    logits[..., 0] = ahead
    logits = logits.reshape(-1, CLASSES)
    labels = np.zeros(len(logits), dtype=np.int64)

    exact = exact_answer(logits, labels, reduction="none")
    found: dict[str, dict[str, Any]] = {"margins": {"values": margins}}
    for name, run in {"torch": _torch, "polyce": _polyce}.items():
        loss, grad = run(logits, labels)
        found[name] = {
            "loss": loss.reshape(margins.size, ROWS)[:, 0],
            "error of the loss": _worst(loss, exact.loss),
            "error of the gradient": _worst(grad[:, 0], exact.grad[:, 0]),
        }
    return found


def _polyce(logits: Any, labels: Any) -> tuple[Any, Any]:
    loss, grad = polyce.cross_entropy_with_grad(
        torch.tensor(logits), torch.tensor(labels), reduction="none"
    )
    return loss.numpy(), grad.numpy()


def _torch(logits: Any, labels: Any) -> tuple[Any, Any]:
    x = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x, torch.tensor(labels), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach().numpy(), grad.numpy()


def _worst(got: Any, exact: Any) -> Any:
    error = np.abs(got.astype(np.float64) - exact) / np.abs(exact)
    return error.reshape(-1, ROWS).max(axis=1)


def error_against_margin() -> str:
    """Draw the figure, as SVG whose text and axes have the colour of the surrounding text."""
    found = measure()
    margins = found.pop("margins")["values"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 7.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        for name, data in found.items():
            colour = COLOURS[name]
            # torch's squares are hollow and drawn first, so that both can be seen where they agree.
            marker = {"marker": "s", "ms": 8, "mfc": "none"} if name == "torch" else {"marker": "."}
            loss = data["loss"]
            shown = loss > 0
            top.plot(margins[shown], loss[shown], color=colour, label=name, **marker)
            if not shown.all():
                first = margins[~shown][0]
                floor = np.full((~shown).sum(), 1e-20)
                top.plot(margins[~shown], floor, marker="x", ls="none", ms=5, color=colour)
                top.text(first, 4e-20, f"{name}: exactly 0", color=colour)
            for what, line in (("error of the loss", "-"), ("error of the gradient", "--")):
                bottom.plot(margins, data[what], line, color=colour, label=f"{name}, {what[9:]}")
        top.set(yscale="log", ylim=(3e-21, 10), ylabel="loss of a row")
        bottom.set(yscale="log", ylim=(1e-9, 10), ylabel="relative error")
        bottom.set_xlabel("margin: how far the label's logit is ahead of the next one")
        bottom.axhline(2**-24, color=TEXT, lw=1, ls=":")
        bottom.text(margins[-1], 2**-24 / 1.4, "half a unit of float32", ha="right", va="top")
        top.legend(loc="upper right")
        bottom.legend(loc="center right")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return drawn.getvalue().replace(TEXT, "currentColor")
