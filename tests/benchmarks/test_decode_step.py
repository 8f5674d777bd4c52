"""The plans that the benchmark of a step reads; timing needs a GPU."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def decode_step():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("decode_step")
    sys.path.remove(folder)


def test_plans_are_read_product_by_product(decode_step):
    plans = decode_step.read_plans("gate_up:tiles=3,blocks=2+down:warps=8")
    assert plans == {"gate_up": {"tiles": 3, "blocks": 2}, "down": {"warps": 8}}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tiles=3", "each part is PRODUCT"),
        ("up:tiles=3", "each part is PRODUCT"),
        ("o:tiles=3+o:warps=8", "once"),
        ("o:tiles=3,tiles=2", "every field of it once"),
        ("o:tiles=5", "tiles of a plan is 5; it is one of 1, 2, 3, 4, or left out"),
        ("o:tile=3", "'tile'"),
        ("o:", "each part is PRODUCT"),
        ("o:tiles=x", "each part is PRODUCT"),
        ("o:warps=16,blocks=2", "2 blocks of 16 warps"),
    ],
)
def test_other_texts_are_refused(decode_step, text, match):
    with pytest.raises(SystemExit, match=match):
        decode_step.read_plans(text)
