"""The search on an NVIDIA GPU: what it measures, and that products computed by it are right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_cusparselt import assert_product, random_x, weight24

from esparse_jax import native
from esparse_jax.sparse import (
    Algorithm,
    Limits,
    _ffi_cuda,
    _ffi_cusparselt,
    choose_form,
    compress24,
    device_blob24,
    load_table,
    save_table,
    sparse_matmul,
    this_machine,
    tune_shape,
    use_table,
)
from esparse_jax.sparse import tune as tune_file
from esparse_jax.sparse._timing import Chain, chain_rotation, random_24
from esparse_jax.sparse._tune_worker import _dense

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX sees no NVIDIA GPU"),
]
SHAPE, ROWS = (1024, 2048), (1, 8, 16, 32, 64)
# Every version of the library has these, and none of them is known to crash: each that does takes
# a child with it.
ALGORITHMS = range(4)


def _as_fast_as_memory(microseconds: float, num_bytes: int) -> bool:
    """No faster than any GPU of today reads the weight, and no slower than a plain loop."""
    return num_bytes / 20e6 < microseconds < 2000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_shape_is_tuned_and_multiplied_by_what_was_found(dtype, tmp_path):
    found = tune_shape(SHAPE, dtype=dtype, rows=ROWS, algorithms=ALGORITHMS)
    table = load_table(save_table(found, tmp_path / "t.json"))
    assert table.machine == this_machine()
    assert table.jax == jax.__version__
    assert [record.rows for record in table.records] == list(ROWS)
    dense_bytes = 2 * SHAPE[0] * SHAPE[1]
    for record in table.records:
        assert _as_fast_as_memory(record.dense, dense_bytes)
        kernel = _ffi_cuda.decode_available() and record.rows <= 32
        assert (record.decode is not None) == kernel
        if kernel:  # of 32 rows it is called twice, which is not timed with prefetch
            assert (record.decode.prefetch is not None) == (record.rows <= 16)
        library = _ffi_cusparselt.available() is None and native.extension().HAS_CUSPARSELT_TIMER
        assert (record.cusparselt is not None) == library
        for way in record.ways() + record.ways(prefetch=True):
            assert _as_fast_as_memory(way.microseconds, dense_bytes * 9 // 16)
    assert choose_form(SHAPE, dtype, (1, 64), table).dense is not None

    weight = weight24(SHAPE, dtype)
    blob = device_blob24(compress24(weight))
    with use_table(table):
        for rows in (1, 7, 16, 20, 40, 64, 100):
            x = random_x(rows, SHAPE[1], dtype=dtype)
            for prefetch in (False, True):
                product = jax.jit(functools.partial(sparse_matmul, prefetch=prefetch))
                assert_product(product(x, blob), x, weight)


def test_a_candidate_that_hangs_is_left_behind(monkeypatch):
    """The child is stopped in the middle of its work, as a candidate that never returns would."""
    if _ffi_cusparselt.available() is not None:
        pytest.skip("cuSPARSELt is not installed")
    ask = tune_file._Child.ask

    def asked(self, request, prepare_seconds, seconds):
        hang = request["candidate"] == {"kind": "cusparselt", "id": 1}
        return ask(self, request, prepare_seconds, 0.0 if hang else seconds)

    monkeypatch.setattr(tune_file._Child, "ask", asked)
    limits = Limits(candidate=60.0)
    table = tune_shape(SHAPE, rows=[64], algorithms=ALGORITHMS, limits=limits)
    (record,) = table.records
    assert record.failed == {"cusparselt, id 1": "with 64 rows: no answer within 0 s"}
    assert record.cusparselt.algorithm != Algorithm(1)
    assert record.cusparselt.microseconds > 0


@pytest.mark.parametrize("rows", [1, 64, 1024])
def test_every_product_of_a_chain_reads_its_weight(rows):
    """None is moved out of the loop or merged with another: it would take no time."""
    weight = random_24(jax.random.key(0), *SHAPE, "float16")
    copies = chain_rotation(weight.nbytes, rows, SHAPE)
    x = random_x(rows, SHAPE[1])
    chain = Chain(_dense, [x], [weight + 0 for _ in range(copies)], microseconds=5.0)
    assert _as_fast_as_memory(chain.microseconds(), weight.nbytes)
    y = np.asarray(chain.call()[-1], np.float64)
    true = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # XLA may add up some parts of a product in 16 bits.
    error = 4 * float(jnp.finfo("float16").eps) * (np.abs(true) + np.sqrt(np.mean(true**2)))
    np.testing.assert_array_less(np.abs(y - true), error)
