"""The loss of a linear head without its logits: cross-entropy of products made chunk by chunk."""
