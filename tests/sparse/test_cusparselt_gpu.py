"""cuSPARSELt itself, on an NVIDIA GPU: its bytes, its numbers, and PyTorch's calls into it."""

import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_cusparselt import assert_product, random_x, weight24
from jax.sharding import PartitionSpec as P

from esparse_jax import native
from esparse_jax.sparse import (
    Algorithm,
    Blob24,
    _ffi_cusparselt,
    blob24,
    compress24,
    device_blob24,
    library_blob_agrees,
    load_cusparselt,
    sparse_matmul,
)


def _why_not() -> str | None:
    if jax.default_backend() != "gpu":
        return "JAX sees no NVIDIA GPU"
    return _ffi_cusparselt.available()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))]
needs_timer = pytest.mark.skipif(
    not getattr(native.extension(), "HAS_CUSPARSELT_TIMER", False),
    reason="the extension was built without its CUDA part",
)
by_library = functools.partial(sparse_matmul, backend="cusparselt")
DTYPES = ("float16", "bfloat16")
# Ids that the library's own search returned on an H200 with 0.8.0. Others may be broken there: an
# illegal instruction takes the process with it.
SEARCHED = (0, 1, 3, 4, 8, 10, 12, 16, 17, 21, 22, 25)


def _architecture() -> int:
    return _ffi_cusparselt.architecture(_ffi_cusparselt.device())


def _two_kept(shape, dtype, seed=0) -> jax.Array:
    """A weight in which every group keeps two values, so that no place is filled up with a zero."""
    random = np.random.default_rng(seed)
    out, channels = shape
    kept = random.permuted(np.tile([True, True, False, False], (out, channels // 4, 1)), axis=2)
    values = random.uniform(0.5, 1, shape) * random.choice([-1, 1], shape)
    return jnp.asarray(np.where(kept.reshape(shape), values / np.sqrt(channels / 2), 0), dtype)


def test_it_is_there():
    assert load_cusparselt().split(".")[0] == "0"
    assert _ffi_cusparselt.opened_library().path.endswith(".so.0")


def test_on_hopper_the_layouts_agree():
    if _architecture() != 90:
        pytest.skip("the layout was read out on sm_90")
    assert library_blob_agrees()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (128, 192), (1536, 384), (4096, 1792)])
def test_the_library_makes_our_bytes(shape, dtype):
    if not library_blob_agrees():
        pytest.skip("the library has a layout of its own here")
    weight = _two_kept(shape, dtype)
    theirs = jax.jit(_ffi_cusparselt.compress)(weight)
    np.testing.assert_array_equal(theirs, blob24(compress24(weight)).data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (2304, 448), (1792, 4096)])
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 65, 1000])
def test_product_for_any_number_of_rows(shape, dtype, rows):
    weight = weight24(shape, dtype)  # groups that keep one value or none among them
    blob, x = device_blob24(compress24(weight)), random_x(rows, shape[1], dtype=dtype)
    assert_product(jax.jit(by_library)(x, blob), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(80, 48), (16, 64), (1040, 2064)])
def test_other_multiples_of_sixteen(shape, dtype):
    weight = weight24(shape, dtype)
    blob, x = device_blob24(compress24(weight)), random_x(20, shape[1], dtype=dtype)
    assert not isinstance(blob, Blob24)
    assert_product(sparse_matmul(x, blob), x, weight)


def test_without_a_backend_more_than_sixteen_rows_take_it_if_an_algorithm_is_asked_for():
    blob = device_blob24(compress24(weight24((256, 512), "float16")))
    asked = jax.jit(functools.partial(sparse_matmul, algorithm=Algorithm(0)))
    lowered = asked.lower(random_x(17, 512), blob).as_text()
    assert native.extension().CUSPARSELT_MATMUL in lowered
    assert "dot_general" not in lowered


def test_without_a_backend_more_than_sixteen_rows_take_it_or_the_prefill_kernel():
    """By what the machine's table says of the nearest product, see test_dispatch.py."""
    blob = device_blob24(compress24(weight24((256, 512), "float16")))
    lowered = jax.jit(sparse_matmul).lower(random_x(17, 512), blob).as_text()
    extension = native.extension()
    kernels = (
        extension.CUSPARSELT_MATMUL,
        extension.CUDA_PREFILL_TARGET,
        extension.CUDA_RECORDED_PREFILL_TARGET,
    )
    assert sum(f"@{kernel}" in lowered for kernel in kernels if kernel) == 1
    assert "dot_general" not in lowered


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_a_zero(dtype):
    mask = np.asarray(_two_kept((128, 256), dtype)) != 0
    # On the host: XLA may turn a product with a mask into a choice, whose zeros have no sign.
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(mask.shape) * mask, dtype)
    assert np.any(np.signbit(np.asarray(weight, np.float32)) & ~mask)
    blob, x = device_blob24(compress24(weight)), random_x(40, 256, dtype=dtype)
    x = x.at[:, ::7].set(-0.0)
    assert_product(by_library(x, blob), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_reach_the_outputs_that_keep_their_channel(dtype):
    weight = _two_kept((64, 128), dtype)
    blob, kept = device_blob24(compress24(weight)), np.asarray(weight, np.float32) != 0
    x = random_x(20, 128, dtype=dtype).at[0, 3].set(jnp.inf).at[19, 5].set(jnp.nan)
    y = np.asarray(by_library(x, blob), np.float32)
    # 0.8.0 on an H200 gives NaN in place of -Inf; a later one may give what the sum is.
    positive, negative = (np.asarray(sign * weight[:, 3] > 0) for sign in (1, -1))
    assert positive.any()
    assert negative.any()
    assert np.all(y[0, positive] == np.inf), str(y[0])
    assert np.all((y[0, negative] == -np.inf) | np.isnan(y[0, negative])), str(y[0])
    assert np.all(np.isfinite(y[0, ~kept[:, 3]])), str(y[0])
    np.testing.assert_array_equal(np.isnan(y[19]), kept[:, 5])
    assert np.all(np.isfinite(y[1:19]))

    row, channel = map(int, np.argwhere(kept)[0])
    blob = device_blob24(compress24(weight.at[row, channel].set(jnp.nan)))
    y = np.asarray(by_library(random_x(20, 128, dtype=dtype), blob), np.float32)
    assert np.all(np.isnan(y[:, row]))
    assert np.all(np.isfinite(np.delete(y, row, axis=1)))


# ---- PyTorch, which calls the same library


def _to_torch(array: jax.Array):
    torch = pytest.importorskip("torch")
    bits = torch.from_numpy(np.asarray(array).view(np.int16).copy()).cuda()
    return bits.view({"float16": torch.float16, "bfloat16": torch.bfloat16}[array.dtype.name])


def _torch_with_library():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or not torch.backends.cusparselt.is_available():
        pytest.skip("this PyTorch has no CUDA or no cuSPARSELt")
    return torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(192, 128), (4096, 1024)])
def test_the_bytes_are_those_of_pytorch(shape, dtype):
    torch = _torch_with_library()
    weight = _two_kept(shape, dtype)
    theirs = torch._cslt_compress(_to_torch(weight)).view(torch.uint8).flatten().cpu().numpy()
    np.testing.assert_array_equal(jax.jit(_ffi_cusparselt.compress)(weight), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (5376, 1792)])
@pytest.mark.parametrize("rows", [8, 64, 1000])
def test_the_bits_are_those_of_pytorch(shape, dtype, rows):
    torch = _torch_with_library()
    weight, x = _two_kept(shape, dtype), random_x(rows, shape[1], dtype=dtype)
    data = jax.jit(_ffi_cusparselt.compress)(weight)
    readers = (_ffi_cusparselt.reader(_ffi_cusparselt.opened_library().version, _architecture()),)
    their_weight, their_x = torch._cslt_compress(_to_torch(weight)), _to_torch(x)
    facts = _ffi_cusparselt.describe_plan(
        rows=rows, out=shape[0], channels=shape[1], dtype=np.dtype(dtype)
    )
    # Segment-K was seen to hang for few outputs; these are enough.
    splits = [1] + ([-1] if _architecture() == 90 else [])
    schema = torch.ops.aten._cslt_sparse_mm.default._schema
    if "split_k" not in {argument.name for argument in schema.arguments}:
        splits = [1]
    found = {}
    for id in (each for each in SEARCHED if each < facts.algorithms):
        for split_k in splits:
            # 1 is what PyTorch leaves unset.
            algorithm = Algorithm(id=id, split_k=None if split_k == 1 else split_k)
            options = {} if split_k == 1 else {"split_k": split_k}
            product = {
                "rows": rows,
                "out": shape[0],
                "channels": shape[1],
                "dtype": np.dtype(dtype),
                "algorithm": algorithm,
            }
            try:
                theirs = torch._cslt_sparse_mm(
                    their_weight, their_x.t(), transpose_result=True, alg_id=id, **options
                )
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    _ffi_cusparselt.describe_plan(**product)
                continue
            workspace = _ffi_cusparselt.describe_plan(**product).workspace_bytes
            found[Algorithm(id, algorithm.split_k, workspace_bytes=workspace)] = theirs

    @jax.jit
    def ours(x, data):
        return [
            _ffi_cusparselt.matmul(x, data, out=shape[0], readers=readers, algorithm=algorithm)
            for algorithm in found
        ]

    assert len(found) > 1
    for (algorithm, theirs), y in zip(found.items(), ours(x, data), strict=True):
        np.testing.assert_array_equal(
            np.asarray(y).view(np.int16),
            theirs.view(torch.int16).cpu().numpy(),
            err_msg=str(algorithm),
        )


# ---- inside XLA


def test_a_chain_of_products_in_a_cuda_graph():
    """XLA records runs of five calls and more, and records again where an address has changed."""
    weights = [_two_kept((1024, 1024), "float16", seed) for seed in range(8)]
    blobs = [device_blob24(compress24(weight)) for weight in weights]

    def chain(x, blobs):
        for blob in blobs:
            x = by_library(x, blob)
        return x

    compiled = jax.jit(chain).lower(random_x(64, 1024), blobs).compile()
    for seed in range(4):
        x = random_x(64, 1024, seed=seed)
        one_by_one = x
        for blob in blobs:
            one_by_one = by_library(one_by_one, blob)
        for _ in range(3):
            np.testing.assert_array_equal(compiled(x, blobs), one_by_one)


@pytest.mark.parametrize("rows", [1, 40])
def test_scan_and_while_over_layers(rows):
    blobs = [device_blob24(compress24(_two_kept((512, 512), "bfloat16", i))) for i in range(6)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blobs)
    x = random_x(rows, 512, dtype="bfloat16")

    @jax.jit
    def scanned(x, stacked):
        return jax.lax.scan(lambda x, blob: (by_library(x, blob), None), x, stacked)[0]

    @jax.jit
    def repeated(x, stacked):
        def layer(state):
            i, x = state
            return i + 1, by_library(x, jax.tree.map(lambda leaf: leaf[i], stacked))

        return jax.lax.while_loop(lambda state: state[0] < 6, layer, (0, x))[1]

    want = x
    for blob in blobs:
        want = by_library(want, blob)
    for _ in range(2):
        np.testing.assert_array_equal(scanned(x, stacked), want)
        np.testing.assert_array_equal(repeated(x, stacked), want)


def test_gradients_are_those_of_the_dense_product():
    weight = _two_kept((256, 512), "float16")
    blob, x = device_blob24(compress24(weight)), random_x(20, 512)
    gradient = jax.grad(lambda x: by_library(x, blob).astype(jnp.float32).sum())(x)
    want = jnp.broadcast_to(weight.astype(jnp.float32).sum(axis=0), x.shape)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), want, atol=2e-2)


def test_threads_get_the_same_bits():
    blob = device_blob24(compress24(_two_kept((1024, 1024), "float16")))
    x = random_x(64, 1024)
    compiled = jax.jit(by_library).lower(x, blob).compile()
    first = np.asarray(compiled(x, blob))
    with ThreadPoolExecutor(8) as threads:
        for y in [threads.submit(compiled, x, blob) for _ in range(64)]:
            np.testing.assert_array_equal(np.asarray(y.result()), first)


def test_every_device_has_a_plan_of_its_own():
    if jax.device_count() < 2:
        pytest.skip("JAX sees one GPU")
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = [_two_kept((512, 512), "float16", seed) for seed in (0, 1)]
    blobs = [device_blob24(compress24(weight)) for weight in weights]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blobs)
    specs = (P(), jax.tree.map(lambda _: P("model"), stacked))

    def shard(x, stacked):
        return by_library(x, jax.tree.map(lambda leaf: leaf[0], stacked))

    run = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P(None, "model")))
    x = random_x(40, 512)
    want = np.concatenate([np.asarray(by_library(x, blob)) for blob in blobs], axis=1)
    for _ in range(3):
        np.testing.assert_array_equal(run(x, stacked), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_share_a_plan_do_not_disturb_each_other(dtype):
    weights = [_two_kept((1024, 512), dtype, seed) for seed in range(8)]
    blobs = [device_blob24(compress24(weight)) for weight in weights]
    x = random_x(40, 512, dtype=dtype)

    @jax.jit
    def independent(x, blobs):  # which XLA may start all at once
        return [by_library(x, blob) for blob in blobs]

    for _ in range(5):
        for y, weight in zip(independent(x, blobs), weights, strict=True):
            assert_product(y, x, weight)
    alone = [jax.jit(lambda x, blob=blob: by_library(x, blob)) for blob in blobs]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            for y, weight in zip(threads.map(lambda run: run(x), alone), weights, strict=True):
                assert_product(y, x, weight)


# ---- for the search of the best


def test_a_question_that_was_asked_before_makes_no_plan():
    product = {"rows": 24, "out": 1936, "channels": 1552, "dtype": np.dtype("float16")}

    def seconds() -> float:
        start = time.perf_counter()
        _ffi_cusparselt.describe_plan(**product)
        return time.perf_counter() - start

    seconds()  # makes the context
    product["rows"] = 32
    first = seconds()
    assert min(seconds() for _ in range(3)) < first / 5


def test_a_plan_is_described_and_an_unknown_algorithm_refused():
    product = {"rows": 16, "out": 4096, "channels": 4096, "dtype": np.dtype("float16")}
    facts = _ffi_cusparselt.describe_plan(**product)
    assert facts.algorithms > 0
    assert 0 <= facts.chosen.id < facts.algorithms
    assert facts.blob_bytes == 4096 * 4096 * 9 // 8
    unknown = Algorithm(id=facts.algorithms, workspace_bytes=0)
    with pytest.raises(RuntimeError, match=f"has the algorithms 0 to {facts.algorithms - 1} for"):
        _ffi_cusparselt.describe_plan(**product, algorithm=unknown)
    blob = device_blob24(compress24(_two_kept((4096, 4096), "float16")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="has the algorithms 0 to"):
        by_library(random_x(16, 4096), blob, algorithm=unknown).block_until_ready()


@needs_timer
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_algorithm_is_timed(dtype):
    shape, x = (4096, 4096), random_x(16, 4096, dtype=dtype)
    blob = jax.jit(_ffi_cusparselt.compress)(_two_kept(shape, dtype))
    copies = math.ceil(300e6 / blob.nbytes)
    blobs = jnp.tile(blob[None], (copies, 1))
    before = np.asarray(blobs[0])
    search = _search(x, shape[0])
    search.take(Algorithm(id=0))
    microseconds = search.time(x, blobs)
    # No faster than the weight can be read by any GPU of today, and no slower than a plain loop.
    assert blob.nbytes / 20e6 < microseconds < 1000
    np.testing.assert_array_equal(blobs[0], before)
    with pytest.raises(RuntimeError, match=f"give at least {copies} copies"):
        search.time(x, blobs[: copies - 1])


@needs_timer
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_launch_shows_what_an_algorithm_computes(dtype):
    weight, x = _two_kept((1024, 512), dtype), random_x(24, 512, dtype=dtype)
    blobs = jax.jit(_ffi_cusparselt.compress)(weight)[None]
    y = jnp.full((40, 1024), jnp.nan, dtype).block_until_ready()  # more rows than are computed
    search = _search(x, 1024)
    search.take(Algorithm(id=0))
    assert search.time(x, blobs, launches=1, replays=1, y=y) > 0
    assert_product(y[:24], x, weight)
    assert np.all(np.isnan(np.asarray(y[24:], np.float32)))


@needs_timer
def test_a_search_computes_what_plans_of_their_own_do():
    """One selection takes many algorithms in turn; nothing of the one before is left in it."""
    weight, x = _two_kept((1024, 512), "float16"), random_x(24, 512)
    blobs = jax.jit(_ffi_cusparselt.compress)(weight)[None]
    product = {"rows": 24, "out": 1024, "channels": 512, "dtype": np.dtype("float16")}
    search = _search(x, 1024)
    splits = ({}, {"split_k": 1}, {"split_k": -1})
    algorithms = [None, *(Algorithm(id=id, **split) for split in splits for id in SEARCHED[:3])]
    timed = set()
    for algorithm in [*algorithms, *algorithms[::-1], *algorithms[::2]]:
        try:
            facts = search.take(algorithm)
        except RuntimeError:  # another architecture
            with pytest.raises(RuntimeError):
                _ffi_cusparselt.describe_plan(**product, algorithm=algorithm)
            continue
        assert facts == _ffi_cusparselt.describe_plan(**product, algorithm=algorithm)
        y = jnp.full((24, 1024), jnp.nan, "float16").block_until_ready()
        search.time(x, blobs, launches=1, replays=1, y=y)
        blob = device_blob24(compress24(weight))
        expected = np.asarray(by_library(x, blob, algorithm=algorithm))
        np.testing.assert_array_equal(np.asarray(y).view(np.int16), expected.view(np.int16))
        timed.add(algorithm and algorithm.split_k)
    assert timed == {None, 1, -1} if _architecture() == 90 else timed


def _search(x, out):
    rows, channels = x.shape
    return _ffi_cusparselt.AlgorithmSearch(rows=rows, out=out, channels=channels, dtype=x.dtype)
