"""Linear algebra, which array-api-compat imports and nothing here calls."""


def lstsq(a: object, b: object, rcond: object = None) -> object:
    """Raise: there is no least-squares solver here."""
    raise NotImplementedError("the emulated CuPy has no linear algebra")
