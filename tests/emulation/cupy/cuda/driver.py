"""The error of CUDA's driver."""


class CUDADriverError(RuntimeError):
    """What CuPy raises for an error code of the driver's."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(f"{status}: {message}")
