"""`esparse doctor`: what this machine can run, and what to do about what it cannot."""

import dataclasses
import importlib.metadata
import importlib.util
import logging
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax

from esparse_jax import native, platforms
from esparse_jax.sparse import (
    build,
    gpus,
    has_prefill,
    library_blob_agrees,
    library_facts,
    load_table,
    records_calls,
    stored_table,
    table_file,
    this_machine,
)
from esparse_jax.sparse.machine import RUN_ON

NO_DEVICE = (
    "JAX cannot start. Set JAX_PLATFORMS=cpu to do without a GPU, or leave it out; JAX's plugin "
    'for NVIDIA GPUs comes with pip install ".[cuda13]".'
)
_PACKAGES = ("esparse-jax", "jax", "jaxlib", "flax")
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name: Of what was looked at.
        value: What was found.
        mend: What to do where something is missing; None where nothing is.
    """

    name: str
    value: str
    mend: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found: to read, and as plain values."""

    findings: list[Finding]
    values: dict[str, Any]

    def lines(self) -> list[str]:
        """For a terminal: what was found, and below it what can be mended."""
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"{finding.name:{width}}  {finding.value}" for finding in self.findings]
        mends = [f"{f.name}: {f.mend}" for f in self.findings if f.mend is not None]
        return [*lines, "", *mends] if mends else lines

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        missing = [
            {"what": finding.name, "found": finding.value, "mend": finding.mend}
            for finding in self.findings
            if finding.mend is not None
        ]
        return self.values | {"missing": missing}


def examine() -> Report:
    """Looks at everything once. Opens the extension, cuSPARSELt and the GPU, where there are."""
    # What is missing is in the report; it need not be logged as well.
    logger = logging.getLogger("esparse_jax")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        sections = (_versions, _devices, _cpu, _cuda, _cusparselt, _layout, _recording, _tuning)
        findings: list[Finding] = []
        values: dict[str, Any] = {}
        for section in sections:
            found, value = section()
            findings += found
            values |= value
        return Report(findings, values)
    finally:
        logger.setLevel(level)


Section = tuple[list[Finding], dict[str, Any]]


def _versions() -> Section:
    versions = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    text = ", ".join(f"{name} {version or 'not found'}" for name, version in versions.items())
    built = build()
    mend, found = None, f"{built.file}, for XLA's FFI {built.ffi_api}"
    if built.file is None:
        found = "not built"
        mend = (
            f"the compiled extension is missing from {Path(native.__file__).parent}, so every "
            f"product runs in plain JAX. {native.MEND}"
        )
    findings = [
        Finding("versions", text),
        Finding("extension", found, mend),
    ]
    extension = {"file": built.file, "ffi_api": built.ffi_api}
    return findings, {"versions": versions, "extension": extension}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Section:
    why = platforms.why_not_started()
    if why is not None:
        return [Finding("devices", why, NO_DEVICE)], {"devices": [], "platform": None}
    devices = jax.devices()
    values = [
        {
            "platform": device.platform,
            "kind": device.device_kind,
            "capability": getattr(device, "compute_capability", None),
            "bytes": (device.memory_stats() or {}).get("bytes_limit"),
        }
        for device in devices
    ]
    kinds: dict[str, int] = {}
    for value in values:
        capability = f" (compute capability {value['capability']})" if value["capability"] else ""
        kind = "" if value["kind"] == value["platform"] else f" {value['kind']}"
        name = f"{value['platform']}{kind}{capability}"
        kinds[name] = kinds.get(name, 0) + 1
    text = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    findings = [Finding("devices", text)]
    if not gpus():
        findings.append(Finding("NVIDIA GPUs", "JAX sees none", _why_no_gpu()))
    return findings, {"devices": values, "platform": devices[0].platform}


def _why_no_gpu() -> str:
    plugins = [name for name in _PLUGINS if _version(name)]
    if plugins:
        return (
            f"{plugins[0]} {_version(plugins[0])} is installed: check the driver with `nvidia-smi`,"
            f" and that JAX_PLATFORMS does not leave CUDA out."
        )
    return "where there is one, install JAX's CUDA plugin: pip install '.[cuda13]' (BUILD.md)."


def _cpu() -> Section:
    levels = build().cpu_levels
    text = ", ".join(levels) if levels else "no compiled product: plain JAX"
    return [Finding("CPU levels", text)], {"cpu_levels": list(levels)}


def _cuda() -> Section:
    built = build()
    values: dict[str, Any] = {"cuda": None}
    if built.cuda_toolkit is None:
        mend = (
            "the decode kernels and the timer are missing. Build with nvcc at hand: pip install . "
            "-C cmake.define.ESPARSE_CUDA=ON (BUILD.md)."
        )
        return [Finding("CUDA part", "not in this build", mend)], values
    not_run = [name for name in built.cuda_code if name not in RUN_ON]
    text = f"CUDA {built.cuda_toolkit}, for {', '.join(built.cuda_code)}"
    if built.prefill:
        text += ", with the prefill kernel (sm_90a)"
    if not_run:
        text += f"; compiled, not run: {', '.join(not_run)}"
    unserved = [
        gpu.compute_capability for gpu in gpus() if not built.runs_on(gpu.compute_capability)
    ]
    mend = None
    if unserved:
        number = unserved[0].replace(".", "")
        mend = (
            f"this build has no code for compute capability {unserved[0]}. Build for it: pip "
            f"install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES={number} (BUILD.md)."
        )
    values["cuda"] = {
        "toolkit": built.cuda_toolkit,
        "code": list(built.cuda_code),
        "prefill": built.prefill,
        "not_run": not_run,
        "serves_this_gpu": not unserved if gpus() else None,
    }
    return [Finding("CUDA part", text, mend)], values


def _cusparselt() -> Section:
    facts = library_facts()
    if facts.version is not None:
        finding = Finding("cuSPARSELt", f"{facts.version}, {facts.path}")
    else:
        use = (
            "products of many rows are faster with it where it was measured so"
            if has_prefill()
            else "on NVIDIA GPUs other than Hopper products of more than 16 rows need it"
        )
        mend = f"{use}: pip install '.[cuda13,cusparselt]' (BUILD.md)."
        finding = Finding("cuSPARSELt", f"not used: {facts.why_not}", mend)
    return [finding], {"cusparselt": facts._asdict()}


def _layout() -> Section:
    name = "weight layout"
    if not gpus() or library_facts().version is None:
        return [Finding(name, "not compared: that takes a GPU and cuSPARSELt")], {
            "blob_agrees": None
        }
    agrees = library_blob_agrees()
    if agrees:
        text = "cuSPARSELt reads and writes Blob24: one copy serves both products"
        return [Finding(name, text)], {"blob_agrees": True}
    mend = (
        "weights made by device_blob24 are cuSPARSELt's own here, and the decode kernels do not "
        "read them. The layout is known for 0.8.0 on compute capability 9.0."
    )
    return [Finding(name, "cuSPARSELt has one of its own", mend)], {"blob_agrees": False}


def _recording() -> Section:
    recorded = records_calls()
    text = (
        "recorded by XLA: the kernels of two calls overlap"
        if recorded
        else "traced by XLA: only kernels inside a call overlap (recording takes jax 0.11, compute "
        "capability 9.0 and a build for sm_90)"
    )
    return [Finding("products in graphs", text)], {"records_calls": recorded}


def _tuning() -> Section:
    machine = this_machine()
    if machine is None:
        return [Finding("tuning table", "none: it is for NVIDIA GPUs")], {"tuning": None}
    stored, own = stored_table(machine), table_file(machine)
    values = {
        "files": list(stored.files),
        "own_file": str(own),
        "records": 0,
        "of_other_libraries": list(stored.others),
    }
    if str(own) not in stored.files and own.exists():  # the log, which says why, is silent here
        try:
            why = f"it is for {load_table(own).machine}; here is {machine}"
        except (OSError, ValueError) as error:
            why = str(error)
        mend = f"products are chosen without it. Remove it, or measure again: {why}"
        return [Finding("tuning table", f"{own} is not used", mend)], {"tuning": values}
    if stored.table is None:
        many = "our own kernels multiply" if has_prefill() else "cuSPARSELt chooses its algorithm"
        mend = (
            f"products are chosen by the number of rows alone, and {many}. Measure: esparse tune "
            f"MODEL, which writes {own}."
        )
        return [Finding("tuning table", f"none for {machine}", mend)], {"tuning": values}
    products = {record.key[:3] for record in stored.table.records}
    values["records"] = len(stored.table.records)
    text = f"{values['records']} records of {len(products)} products, {', '.join(stored.files)}"
    if not stored.others or str(own) in stored.files:  # which was measured with this library
        return [Finding("tuning table", text)], {"tuning": values}
    theirs = ", ".join(other or "none" for other in stored.others)
    mend = (
        f"measured with another cuSPARSELt ({theirs}): what it says of our own kernels is used. "
        f"For the library's algorithms measure here (esparse tune MODEL), or install that version."
    )
    return [Finding("tuning table", text, mend)], {"tuning": values}
