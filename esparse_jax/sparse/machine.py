"""What the machine at hand is, and what of the 2:4 products it can run."""

import re
from typing import NamedTuple

import jax

from esparse_jax import native

from . import _ffi, _ffi_cuda, _ffi_cusparselt

# Where the CUDA kernels were run; for the others of a build they were compiled and not run.
RUN_ON = ("sm_90",)


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
    library = _ffi_cusparselt.opened_library()
    major, minor = divmod(_ffi_cusparselt.architecture(gpu), 10)
    version = None if library is None else library.version_name
    return Machine(gpu.device_kind, f"{major}.{minor}", version)


class Build(NamedTuple):
    """What the compiled extension holds.

    Attributes:
        file: Where it is; None where there is none.
        ffi_api: Version of XLA's FFI that it was compiled for, "0.3"; jaxlib refuses later ones
            than its own.
        cpu_levels: Instruction-set levels of the CPU's product that this processor runs, best
            first.
        cuda_toolkit: The version that its CUDA part was compiled with; None without that part.
        cuda_code: The architectures it has machine code for, "sm_90", and those it has PTX for,
            "PTX of sm_90", which later GPUs translate.
        prefill: Whether the prefill kernel is in it, which is for compute capability 9.0.
    """

    file: str | None
    ffi_api: str | None
    cpu_levels: tuple[str, ...]
    cuda_toolkit: str | None
    cuda_code: tuple[str, ...]
    prefill: bool = False

    def runs_on(self, capability: str) -> bool:
        """Whether its CUDA part runs on a GPU of this compute capability, "9.0"."""
        major, minor = map(int, capability.split("."))
        for name in self.cuda_code:
            number, specific = re.search(r"sm_(\d+)([af]?)", name).groups()
            has = int(number[:-1]), int(number[-1])
            if specific:  # for this GPU alone
                fits = has == (major, minor)
            elif name.startswith("PTX"):
                fits = has <= (major, minor)
            else:
                fits = has[0] == major and has[1] <= minor
            if fits:
                return True
        return False


def build() -> Build:
    """What the extension of this installation holds. Touches no device."""
    extension = native.extension()
    if extension is None:
        return Build(None, None, (), None, ())
    code = []
    for name in extension.CUDA_ARCHITECTURES.split():  # CMake's: 90 is both, 90-real, 90-virtual
        number, _, kind = name.partition("-")
        if kind != "virtual":
            code.append(f"sm_{number}")
        if kind != "real":
            code.append(f"PTX of sm_{number}")
    return Build(
        extension.__file__,
        extension.FFI_API_VERSION,
        _ffi.cpu_levels(),
        extension.CUDA_TOOLKIT or None,
        tuple(code),
        _ffi_cuda.prefill_available(),
    )


class LibraryFacts(NamedTuple):
    """What is known of cuSPARSELt here.

    Attributes:
        version: "0.8.0"; None where it cannot be called.
        path: The file it was loaded from.
        why_not: Why it cannot be called.
    """

    version: str | None
    path: str | None
    why_not: str | None


def library_facts() -> LibraryFacts:
    """Looks for cuSPARSELt and opens it, which does not need a GPU."""
    opened = _ffi_cusparselt.opened_library()
    if opened is None:
        return LibraryFacts(None, None, _ffi_cusparselt.available())
    return LibraryFacts(opened.version_name, opened.path, None)


def records_calls() -> bool:
    """Whether products overlap, because XLA records each as a kernel of its own CUDA graph."""
    return bool(gpus()) and _ffi_cuda.decode_available() and _ffi_cuda.records_calls()


def has_prefill() -> bool:
    """Whether the prefill kernel is for the GPU that JAX sees first, and in this build."""
    machine = this_machine()
    return machine is not None and _ffi_cuda.prefill_runs(machine.capability)


def gpus() -> list[jax.Device]:
    """The NVIDIA GPUs that JAX sees."""
    try:
        return jax.devices("cuda")
    except (RuntimeError, AssertionError):  # the latter where JAX cannot start at all
        return []
