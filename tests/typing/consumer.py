"""A caller, for the type checker: `nox -s types` reads this file, and nothing runs it."""

import numpy as np

import polyce

logits = np.zeros((4, 3), dtype=np.float32)
labels = np.array([0, 2, 1, 1])

loss = polyce.cross_entropy(logits, labels)
rows = polyce.cross_entropy(
    logits,
    labels,
    weight=np.ones(3, dtype=np.float32),
    ignore_index=-1,
    label_smoothing=0.1,
    reduction="none",
    axis=1,
    validate=False,
)
print(float(loss), rows.shape)

value, gradient = polyce.cross_entropy_with_grad(logits, labels)
print(value, gradient.shape)

print(polyce.nll_loss(polyce.log_softmax(logits), labels))

criterion = polyce.CrossEntropyLoss(label_smoothing=0.1)
print(criterion(logits, labels), criterion.reduction)
print(polyce.NLLLoss(reduction="sum")(polyce.log_softmax(logits), labels))

with polyce.use("reference"):
    print(polyce.explain(logits, labels))
polyce.show_versions()
found: polyce.Score = polyce.score(logits, labels, bins=10)
print(found, found.loss + found.loss_error, found.as_dict()["ece"])

version: str = polyce.__version__

# The checker must refuse these: if it does not, "unused type: ignore" is an error.
polyce.cross_entropy(logits)  # type: ignore[call-arg]
polyce.cross_entropy(logits, labels, reduction=3)  # type: ignore[arg-type]
