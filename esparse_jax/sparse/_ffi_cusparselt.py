"""cuSPARSELt: finds and opens NVIDIA's library, and wraps the extension's calls into it.

Nothing happens at import. The library is optional and never bundled; `available` says why it cannot
be called, where it cannot.
"""

import dataclasses
import enum
import functools
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from esparse_jax import native

from . import _ffi

_LOGGER = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16")
UNIT = 16  # divides the outputs and channels of a weight
ROW_UNIT = 8  # divides the rows of x that the library sees
_SONAME = "libcusparseLt.so.0"
# Below site-packages/nvidia: from 0.9.0 on beside the other libraries of a CUDA version, before
# that in a folder of its own. The newest layout first: an older library that is opened cannot be
# unloaded, and a process has one.
_WHEEL_FOLDERS = ("cu13/lib", "cu12/lib", "cusparselt/lib")
# What is set aside for a product that is lowered where no GPU can be asked.
WORKSPACE_UNKNOWN = 8 << 20


class SplitKMode(enum.IntEnum):
    """How partial sums over channels are put together: cusparseLtSplitKMode_t."""

    ONE_KERNEL = 1
    TWO_KERNELS = 2
    HEURISTIC = 3
    DATA_PARALLEL = 4
    SPLIT_K = 5
    STREAM_K = 6


_ALLOWED = {  # of an algorithm's fields, where they are given
    "id": (lambda value: value >= 0, "a number from 0"),
    "split_k": (lambda value: value == -1 or value >= 1, "-1 (segment-K) or from 1"),
    "split_k_mode": (lambda value: value in list(SplitKMode), "a SplitKMode"),
    "split_k_buffers": (lambda value: value >= 1, "a number from 1"),
    "workspace_bytes": (lambda value: value >= 0, "a number of bytes"),
}


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One way the library can compute a product. Its numbers mean nothing on another architecture,
    in another version, or for another shape or dtype.

    Attributes:
        id: 0 to `PlanFacts.algorithms - 1`; None is the library's own choice.
        split_k: Slices the sum over channels is cut into; -1 is segment-K (Hopper and later); None
            leaves it to the library. On Hopper only 1 and -1 are allowed, elsewhere 1 to channels.
        split_k_mode: A `SplitKMode`; which are allowed depends on the architecture. None leaves it
            to the library.
        split_k_buffers: Buffers for partial sums, 1 to `split_k - 1`; None leaves it to the
            library, as it must be on Hopper.
        workspace_bytes: What a product needs beside its arrays. None asks the GPU when the product
            is traced; where there is none, 8 MiB are set aside.

    Source: cusparseLt.h 0.10.0, cusparseLtMatmulAlgAttribute_t, and the error texts of 0.8.0.
    """

    id: int | None = None
    split_k: int | None = None
    split_k_mode: int | None = None
    split_k_buffers: int | None = None
    workspace_bytes: int | None = None

    def __post_init__(self):
        for name, (allowed, words) in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise ValueError(
                    f"{name} of an algorithm must be {words}, or None to leave it to the library; "
                    f"got {value}."
                )

    def _attributes(self) -> dict[str, int]:
        """The handler's attributes; 0 leaves a value as the library has it."""
        return {
            "algorithm": -1 if self.id is None else self.id,
            "split_k": self.split_k or 0,
            "split_k_mode": int(self.split_k_mode or 0),
            "split_k_buffers": self.split_k_buffers or 0,
        }


@dataclasses.dataclass(frozen=True)
class OpenedLibrary:
    """An opened cuSPARSELt.

    Attributes:
        version: 800 for 0.8.0: minor * 100 + patch.
        path: The file it was loaded from.
        on_host: The tests' stand-in, which computes on the CPU platform.
    """

    version: int
    path: str
    on_host: bool = False

    @property
    def version_name(self) -> str:
        return f"{self.version // 1000000}.{self.version % 1000000 // 100}.{self.version % 100}"

    @property
    def platform(self) -> str:
        """The platform its products are lowered for."""
        return "cpu" if self.on_host else "cuda"


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """What the library says of one product on this machine's GPU.

    Attributes:
        algorithms: Their ids are 0 to `algorithms - 1`.
        chosen: What the library makes of the algorithm asked for, of None above all; without what
            it does not tell.
        blob_bytes: Size of the compressed weight.
        workspace_bytes: What the product needs beside its arrays; in `chosen` as well.
    """

    algorithms: int
    chosen: Algorithm
    blob_bytes: int
    workspace_bytes: int


def available() -> str | None:
    """Why cuSPARSELt cannot be called, or None where it can be. Asked once per process."""
    found = _find()
    return found if isinstance(found, str) else None


def opened_library() -> OpenedLibrary | None:
    """The library of this process, opened on first use, or None where there is none."""
    found = _find()
    return None if isinstance(found, str) else found


def load_cusparselt() -> str:
    """Opens cuSPARSELt and returns its version, "0.8.0" for example.

    Only needed before running a computation that was exported or serialised elsewhere: tracing one
    that calls the library opens it.

    Raises:
        RuntimeError: It cannot be called; the message says why.
    """
    return _require().version_name


@functools.cache
def _find() -> OpenedLibrary | str:
    extension = native.extension()
    if extension is None:
        return "the compiled extension is missing (see BUILD.md)"
    tried = []
    for path in [*map(str, _wheel_files()), ""]:  # "" is the system's search
        try:
            opened = OpenedLibrary(*extension.cusparselt_open(path))
        except RuntimeError as error:
            tried.append(str(error))
            continue
        _LOGGER.info("cuSPARSELt %s: %s", opened.version_name, opened.path)
        return opened
    return " ".join(dict.fromkeys(tried))  # one that is loaded and refused is met again


def _wheel_files() -> Iterator[Path]:
    """The library as pip installs it: nvidia-cusparselt-cu13 or -cu12."""
    spec = importlib.util.find_spec("nvidia")  # a namespace: finding it imports nothing
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for folder in _WHEEL_FOLDERS:
            file = Path(root) / folder / _SONAME
            if file.is_file():
                yield file


def _require() -> OpenedLibrary:
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(
            f"cuSPARSELt cannot be called: {found} Install it beside jax, pip install "
            f'nvidia-cusparselt-cu13 (see BUILD.md), or use backend="reference".'
        )
    return found


def _loaded_extension() -> ModuleType:
    extension = native.extension()
    assert extension is not None, "an OpenedLibrary comes from the extension"
    return extension


def device() -> jax.Device | None:
    """The GPU that stands for this process's GPUs: the first, or None where JAX sees none."""
    opened = opened_library()
    try:
        return jax.devices("cpu" if opened and opened.on_host else "cuda")[0]
    except (RuntimeError, AssertionError):  # the latter where JAX cannot start at all
        return None


def architecture(of: jax.Device) -> int:
    """90 for compute capability 9.0."""
    opened = opened_library()
    if opened and opened.on_host:
        return _loaded_extension().cusparselt_host_architecture()
    return int(of.compute_capability.replace(".", ""))


def reader(version: int, architecture: int) -> int:
    """The number that stands for one version on one architecture in a product's attributes."""
    return version * 1000 + architecture


def describe_plan(
    *, rows: int, out: int, channels: int, dtype: np.dtype, algorithm: Algorithm | None = None
) -> PlanFacts:
    """What the library says of a product, for the GPU that the CUDA runtime takes by default.

    Raises:
        RuntimeError: There is no library or no GPU, or it refuses the product or the algorithm;
            the message names its call.
    """
    opened = _require()
    answer = _loaded_extension().cusparselt_plan(
        rows=_padded(rows),
        out=out,
        channels=channels,
        dtype=np.dtype(dtype).name,
        on_host=opened.on_host,
        **(algorithm or Algorithm())._attributes(),
    )
    return _plan_facts(answer)


def _plan_facts(answer: dict[str, int]) -> PlanFacts:
    """What the extension says of a plan."""
    reported = {
        "id": answer["algorithm"],
        **{name: answer[name] for name in ("split_k", "split_k_mode", "split_k_buffers")},
    }
    chosen = Algorithm(
        workspace_bytes=answer["workspace_bytes"],
        **{name: value for name, value in reported.items() if _ALLOWED[name][0](value)},
    )
    return PlanFacts(answer["algorithms"], chosen, answer["blob_bytes"], answer["workspace_bytes"])


@functools.cache
def _workspace_bytes(
    opened: OpenedLibrary, rows: int, out: int, channels: int, dtype: str, algorithm: Algorithm
) -> int:
    del opened  # part of the key
    return describe_plan(
        rows=rows, out=out, channels=channels, dtype=np.dtype(dtype), algorithm=algorithm
    ).workspace_bytes


def _padded(rows: int) -> int:
    return -(-rows // ROW_UNIT) * ROW_UNIT


def why_not(shape: tuple[int, int], dtype: np.dtype) -> str | None:
    """Why the library takes no weight of this shape and dtype, as half a sentence, or None."""
    if np.dtype(dtype).name not in DTYPES:
        return f"it is {np.dtype(dtype).name}, and only {' and '.join(DTYPES)} weights are taken"
    if min(shape) < UNIT or any(size % UNIT for size in shape):
        return f"its shape {tuple(shape)} is not made of multiples of {UNIT}"
    return None


def matmul(
    x: Float[Array, "row channel"],
    blob: UInt8[Array, " blob_byte"],
    *,
    out: int,
    readers: tuple[int, ...],
    algorithm: Algorithm | None = None,
) -> Float[Array, "row out"]:
    """`x @ weight.T` by cuSPARSELt; sums in float32, rounded once.

    Args:
        x: float16 or bfloat16. Rows are padded to a multiple of 8 for the call.
        blob: The weight as the library compresses it, with `out` outputs.
        readers: Each version and architecture (`reader`) that reads this blob; on any other the
            computation stops with an error.
        algorithm: None is the library's own choice.

    Raises:
        RuntimeError: The library cannot be called, or refuses the product.
    """
    opened, gpu = opened_library(), device()
    if opened is None and (gpu is not None or native.extension() is None):
        _require()  # without a GPU it is not needed: the computation is lowered for elsewhere
    extension = _loaded_extension()
    on_host = opened is not None and opened.on_host
    rows, channels = x.shape
    if rows == 0:
        return jnp.zeros((0, out), x.dtype)
    algorithm = algorithm or Algorithm()
    workspace = algorithm.workspace_bytes
    if workspace is None:
        workspace = WORKSPACE_UNKNOWN
        if gpu is not None:
            workspace = _workspace_bytes(
                opened, _padded(rows), out, channels, x.dtype.name, algorithm
            )
    if _padded(rows) != rows:
        x = jnp.pad(x, ((0, _padded(rows) - rows), (0, 0)))
    target = extension.CUSPARSELT_MATMUL_HOST if on_host else extension.CUSPARSELT_MATMUL
    results = [
        _ffi.result_like(x, blob, (x.shape[0], out), x.dtype),
        _ffi.result_like(x, blob, (workspace,), jnp.uint8),
    ]
    attributes = {name: np.int32(value) for name, value in algorithm._attributes().items()}
    y, _ = jax.ffi.ffi_call(target, results)(
        x, blob, readers=np.array(readers, np.int32), **attributes
    )
    return y[:rows]


@functools.cache
def _compressed_bytes(
    opened: OpenedLibrary, out: int, channels: int, dtype: str
) -> tuple[int, int]:
    return _loaded_extension().cusparselt_compressed_bytes(
        out=out, channels=channels, dtype=dtype, on_host=opened.on_host
    )


def compress(weight: Float[Array, "out channel"]) -> UInt8[Array, " blob_byte"]:
    """The library's own compression of a 2:4 weight with its zeros in place.

    -0.0 must not stand for a zero: the library's compressors are made for weights that have +0.0.
    A weight from `decompress24` has no other.

    Raises:
        RuntimeError: There is no library or no GPU, or it refuses the weight.
    """
    opened = _require()
    extension = _loaded_extension()
    out, channels = weight.shape
    blob_bytes, workspace = _compressed_bytes(opened, out, channels, weight.dtype.name)
    target = extension.CUSPARSELT_COMPRESS_HOST if opened.on_host else extension.CUSPARSELT_COMPRESS
    results = [
        _ffi.result_like(weight, weight, (blob_bytes,), jnp.uint8),
        _ffi.result_like(weight, weight, (workspace,), jnp.uint8),
    ]
    return jax.ffi.ffi_call(target, results, vmap_method="sequential")(weight)[0]


class AlgorithmSearch:
    """The algorithms of one product, one after the other, on one GPU.

    What the library has to be told is told once: to take another algorithm is then much faster than
    a plan made anew. For one thread at a time.

    Args:
        rows: Of x, a multiple of 8.
        out, channels: Of the weight.
        dtype: float16 or bfloat16.
        gpu: None is JAX's first.

    Raises:
        RuntimeError: There is no library, or no GPU.
        ValueError: 8 does not divide the rows.
    """

    def __init__(
        self, *, rows: int, out: int, channels: int, dtype: np.dtype, gpu: jax.Device | None = None
    ):
        opened = _require()
        if rows % ROW_UNIT or rows == 0:
            raise ValueError(f"a search takes a multiple of {ROW_UNIT} rows; got {rows}. Pad x.")
        self._gpu = device() if gpu is None else gpu
        if self._gpu is None:
            raise RuntimeError(
                "a search times products on an NVIDIA GPU, and JAX sees none. `esparse doctor` "
                "says what is missing."
            )
        self._x = jax.ShapeDtypeStruct((rows, channels), np.dtype(dtype))
        self._out = out
        self._taken: PlanFacts | None = None
        self._search = _loaded_extension().CusparseltSearch(
            rows=rows,
            out=out,
            channels=channels,
            dtype=np.dtype(dtype).name,
            device=self._gpu.local_hardware_id or 0,
            on_host=opened.on_host,
        )

    def take(self, algorithm: Algorithm | None) -> PlanFacts:
        """Takes an algorithm, None being the library's own choice; the one before is given up.

        Raises:
            RuntimeError: The library refuses the product or the algorithm; the message names its
                call. Another one can be taken then.
        """
        self._taken = None
        answer = self._search.take(**(algorithm or Algorithm())._attributes())
        self._taken = _plan_facts(answer)
        return self._taken

    def time(
        self,
        x: Float[Array, "row channel"],
        blobs: UInt8[Array, "copy blob_byte"],
        *,
        launches: int = 48,
        replays: int = 11,
        y: Float[Array, "all_rows out"] | None = None,
    ) -> float:
        """Microseconds a product takes by what was taken: the median over replays of a CUDA graph.

        A bad algorithm may leave the GPU's context broken, or never return: search in a process of
        its own, with a time limit.

        Args:
            x: On the GPU of the search, as all that is given.
            blobs: Copies of one weight that come to 300 MB or more with x and y, so that none is
                still in the cache when its turn comes again. A single launch takes one copy of any
                size.
            launches: In one graph; at least as many as there are copies.
            y: The product is written over its first rows, to be looked at afterwards. None: it is
                thrown away.

        Raises:
            RuntimeError: The extension has no CUDA part, or no algorithm was taken, or the GPU
                failed; the message names the call.
            ValueError: Arrays that are not what the search was made for.
        """
        if not native.extension().HAS_CUSPARSELT_TIMER:
            raise RuntimeError(
                "timing an algorithm needs the compiled extension with its CUDA part, which is not "
                "in this build. Install with nvcc at hand, pip install . "
                "-C cmake.define.ESPARSE_CUDA=ON (see BUILD.md)."
            )
        if self._taken is None:
            raise RuntimeError("there is no algorithm to time: take one first.")
        rows, dtype = self._x.shape[0], self._x.dtype
        if y is None:
            with jax.default_device(self._gpu):
                y = jnp.zeros((rows, self._out), dtype)
        self._require_arrays(x, blobs, y)
        # What a workspace holds at first is not known where XLA sets it aside. Made on the host,
        # since every size would be compiled for.
        workspace = self._taken.workspace_bytes
        scratch = jax.device_put(np.full(max(workspace, 1), 0xFF, np.uint8), self._gpu)
        jax.block_until_ready((x, blobs, y, scratch))
        return self._search.time(
            x=x.unsafe_buffer_pointer(),
            blobs=blobs.unsafe_buffer_pointer(),
            copies=blobs.shape[0],
            y=y.unsafe_buffer_pointer(),
            workspace=scratch.unsafe_buffer_pointer(),
            workspace_bytes=workspace,
            launches=max(launches, blobs.shape[0]),
            replays=replays,
        )

    def _require_arrays(self, x: Array, blobs: Array, y: Array) -> None:
        """Their addresses are all that the extension gets."""
        (rows, channels), dtype = self._x.shape, self._x.dtype
        if (x.shape, x.dtype) != (self._x.shape, dtype):
            raise ValueError(
                f"this search is for x of {dtype.name}[{rows}, {channels}]; got "
                f"{x.dtype.name}{list(x.shape)}. Make another AlgorithmSearch."
            )
        if y.shape[0] < rows or y.shape[1:] != (self._out,) or y.dtype != dtype:
            raise ValueError(
                f"y must be {dtype.name}[{rows} or more, {self._out}]; got "
                f"{y.dtype.name}{list(y.shape)}."
            )
        if blobs.shape[1] != self._taken.blob_bytes:
            raise ValueError(
                f"a blob of this weight has {self._taken.blob_bytes} bytes; got blobs of "
                f"{blobs.shape[1]}."
            )
        for name, array in (("x", x), ("blobs", blobs), ("y", y)):
            if array.devices() != {self._gpu}:
                raise ValueError(
                    f"this search is for {self._gpu}; {name} is on "
                    f"{', '.join(map(str, array.devices()))}. Put it there, or make another "
                    f"AlgorithmSearch with that gpu."
                )
