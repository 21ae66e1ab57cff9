"""The loss of a linear head without all its logits: they are computed chunk by chunk."""
