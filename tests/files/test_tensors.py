import hashlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from esparse_jax.files import tensors

FLOATING = (np.float32, np.float16, ml_dtypes.bfloat16)


def test_written_tensors_are_read_by_safetensors(tmp_path):
    file = tmp_path / "x.safetensors"
    layout = {"a": ("BF16", (3,)), "b": ("F32", (2, 2)), "c": ("I32", (1,)), "d": ("F16", (2, 3))}
    values = {
        "a": np.arange(3).astype(ml_dtypes.bfloat16),
        "b": np.ones((2, 2), np.float32),
        "c": np.array([7], np.int32),
        "d": np.arange(6, dtype=np.float16).reshape(3, 2).T,  # not contiguous
    }
    digest = tensors.write_tensors(file, layout, values.__getitem__)
    assert digest == tensors.file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    read = load_file(file)
    assert set(read) == set(values)
    for name, value in tensors.read_tensors(file).items():
        np.testing.assert_array_equal(value, values[name])
        np.testing.assert_array_equal(read[name], values[name])


def test_rewriting_keeps_what_is_not_replaced(tmp_path):
    values = {
        "a": np.arange(4, dtype=np.float32),
        "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "count": np.arange(3),  # int64: not a weight, never offered
    }
    source, target = tmp_path / "source", tmp_path / "target"
    save_file(values, source, metadata={"format": "pt", "note": "kept"})
    offered = []

    def replace(name, stored):
        offered.append(name)
        np.testing.assert_array_equal(stored, values[name])
        return -stored if name == "b" else None

    digests = tensors.rewrite_tensors(source, target, replace)
    assert digests == (tensors.file_sha256(source), tensors.file_sha256(target))
    assert sorted(offered) == ["a", "b"]
    header = int.from_bytes(source.read_bytes()[:8], "little") + 8
    assert source.read_bytes()[:header] == target.read_bytes()[:header]
    for name, value in load_file(target).items():
        np.testing.assert_array_equal(value, -values[name] if name == "b" else values[name])


@pytest.mark.parametrize("dtype", FLOATING)
def test_bits_tell_zeros_and_numbers_that_are_not_finite(dtype):
    least = np.array(1, np.uint32 if dtype is np.float32 else np.uint16).view(dtype)
    values = np.array([0, -0.0, 1, -2, np.nan, np.inf, -np.inf, least], dtype)
    np.testing.assert_array_equal(tensors.nonzero(values), [0, 0, 1, 1, 1, 1, 1, 1])
    assert tensors.nonfinite_count(values) == 3


def test_dtypes_that_cannot_be_stored():
    with pytest.raises(ValueError, match="Tensors of dtype int8 cannot be stored; they may be flo"):
        tensors.header_dtype(np.dtype(np.int8))
