"""Machine code as cuobjdump prints it, and what is judged of it."""

import importlib
import sys
from pathlib import Path

import pytest

DECODE, ATTEND, OTHER = "esparse_decode_float16_1_1", "esparse_attend_float16_64_1_4", "_Z6Gatherv"
PREFILL = "esparse_prefill_float16_256x128_shared"


@pytest.fixture(scope="module")
def sass():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("sass")
    sys.path.remove(folder)


def printed(parts: dict[str, dict[str, tuple[list[str], int]]]) -> dict[str, list[str]]:
    """Lines of `-sass` and `-res-usage`; instructions and registers by architecture and kernel."""
    lines = {"-sass": [], "-res-usage": []}
    for architecture, kernels in parts.items():
        for part in lines.values():
            part += ["Fatbin elf code:", f"arch = {architecture}"]
        lines["-sass"].append(f"\tcode for {architecture}")
        for name, (instructions, registers) in kernels.items():
            lines["-sass"].append(f"\t\tFunction : {name}")
            lines["-sass"] += [f"        /*0000*/    {what} ;" for what in instructions]
            lines["-res-usage"] += [f" Function {name}:", f"  REG:{registers} STACK:0 SHARED:16"]
    return lines


def good() -> dict[str, dict[str, tuple[list[str], int]]]:
    return {
        "sm_80": {
            DECODE: (["LDG.E R2, [R4]", "HMMA.SP.16832.F32 R4, R8, R12, R4"], 124),
            # Not looked at: there are no clusters.
            ATTEND: (["STL [R1], R2"], 200),
        },
        "sm_90": {
            DECODE: (["HMMA.SP.16832.F32 R4, R8, R12, R4"], 123),
            ATTEND: (["FFMA R2, R4, R6, R2"], 255),
            OTHER: (["LDG.E R2, [R4]"], 32),
        },
        "sm_90a": {
            PREFILL: (["HGMMA.SP.64x256x32.F32 R24, gdesc[UR4], R24, R159, 0x0"], 163),
        },
    }


def judge(sass, monkeypatch, parts) -> int:
    lines = printed(parts)
    monkeypatch.setattr(sass, "_lines", lambda cuobjdump, option, extension: lines[option])
    return sass.main(sass.Arguments(extension=Path("extension.so"), cuobjdump=Path("cuobjdump")))


def test_each_family_has_a_line(sass, monkeypatch, capsys):
    assert judge(sass, monkeypatch, good()) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| sm_80 | decode | 1 | 1 | 0 | 124 |",
        "| sm_90 | decode | 1 | 1 | 0 | 123 |",
        "| sm_90 | attention | 1 | 0 | 0 | 255 |",
        "| sm_90 | other | 1 | 0 | 0 | 32 |",
        "| sm_90a | prefill | 1 | 1 | 0 | 163 |",
    ]


@pytest.mark.parametrize(
    ("architecture", "kernel", "code"),
    [
        ("sm_80", DECODE, ["HMMA.16816.F32 R4, R8, R12, R4"]),
        ("sm_80", DECODE, ["HMMA.SP.16832.F32 R4, R8, R12, R4", "LDL R2, [R1]"]),
        ("sm_90", ATTEND, ["STL.64 [R1+0x8], R2"]),
        ("sm_90", OTHER, ["LDL R2, [R1]"]),
        ("sm_90a", PREFILL, ["HGMMA.64x256x16.F32 R24, gdesc[UR4], R24, UP0"]),
        ("sm_80", DECODE, None),
        ("sm_90a", PREFILL, None),
        ("sm_90", ATTEND, None),
    ],
)
def test_what_is_wrong_shows_in_the_exit_status(sass, monkeypatch, architecture, kernel, code):
    parts = good()
    del parts[architecture][kernel]
    if code is not None:
        parts[architecture][kernel] = (code, 99)
    else:
        parts[architecture]["_Z4Restv"] = ([], 8)
    assert judge(sass, monkeypatch, parts) == 1


def test_no_machine_code_is_wrong(sass, monkeypatch):
    assert judge(sass, monkeypatch, {}) == 1
