"""The error that CUDA's driver gives."""


class CUDADriverError(RuntimeError):
    """What CuPy raises for a status of the driver's."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(f"{status}: {message}")
