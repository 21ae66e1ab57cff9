"""What a call means: targets, labels, the transform of the logits, the row state and its values."""
