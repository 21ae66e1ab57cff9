"""The error of CuPy's compiler."""


class CompileException(Exception):
    """What CuPy raises for a text that does not compile."""

    def __init__(self, message: str, source: str, name: str, options: tuple[str, ...]) -> None:
        self._msg = message
        self.source = source
        self.name = name
        self.options = options
        super().__init__(message)
