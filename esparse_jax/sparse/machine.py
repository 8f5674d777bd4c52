"""What the machine at hand is, as far as 2:4 products are concerned."""

from typing import NamedTuple

from . import _ffi_cusparselt


class Machine(NamedTuple):
    """What a tuning table is for: times and algorithm numbers mean nothing elsewhere.

    Attributes:
        device: The kind of GPU, "NVIDIA H200".
        capability: Its compute capability, "9.0".
        cusparselt: The library's version, "0.8.0"; None where it is not installed.
    """

    device: str
    capability: str
    cusparselt: str | None

    @property
    def reader(self) -> int | None:
        """Its library and architecture as one number, see `_ffi_cusparselt.reader`."""
        if self.cusparselt is None:
            return None
        major, minor, patch = map(int, self.cusparselt.split("."))
        architecture = int(self.capability.replace(".", ""))
        return _ffi_cusparselt.reader(major * 1000000 + minor * 100 + patch, architecture)

    def __str__(self) -> str:
        library = f"cuSPARSELt {self.cusparselt}" if self.cusparselt else "no cuSPARSELt"
        return f"{self.device} ({self.capability}) with {library}"


def this_machine() -> Machine | None:
    """The GPU that stands for this process's GPUs, and its library; None where JAX sees no GPU."""
    gpu = _ffi_cusparselt.device()
    if gpu is None:
        return None
    library = _ffi_cusparselt.library()
    major, minor = divmod(_ffi_cusparselt.architecture(gpu), 10)
    version = None if library is None else library.version_name
    return Machine(gpu.device_kind, f"{major}.{minor}", version)
