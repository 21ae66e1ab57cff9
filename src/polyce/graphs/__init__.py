"""The derivative rules of torch and jax, and what these libraries do around a call."""
