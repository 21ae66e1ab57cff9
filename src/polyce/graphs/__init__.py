"""The derivative rules of torch and jax, and what these do around a call."""
