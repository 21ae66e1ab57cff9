"""The few names of CUDA's runtime that polyce or CuPy's users ask for."""

from .device import COUNT, get_device_id, set_device

is_hip = False


class CUDARuntimeError(RuntimeError):
    """CUDA's runtime errors; the emulation raises none."""


def getDevice() -> int:
    """Return the number of the current device."""
    return get_device_id()


def setDevice(device: int) -> None:
    """Make a device current."""
    set_device(device)


def getDeviceCount() -> int:
    """Return how many devices there are."""
    return COUNT


def driverGetVersion() -> int:
    """Return the version number of CUDA 12.9."""
    return 12090


def runtimeGetVersion() -> int:
    """Return the version number of CUDA 12.9."""
    return 12090
