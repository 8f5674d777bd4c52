"""The decode kernel: its lowering and its plain twins anywhere, its numbers on an NVIDIA GPU."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import (
    random_blob,
    random_order,
    random_x,
    relative,
    rounding,
    slow_product,
    variants,
)
from lowering import lowered_for_cuda

from esparse_jax.sparse import (
    Blob24,
    ChainWeights,
    _ffi_cuda,
    _ffi_cusparselt,
    blob24,
    compressed24_of,
    decompress24,
    fused_matmul,
    fused_matmul_reference,
    interleave_gate_up,
    sparse_chain,
    sparse_chain_reference,
    sparse_matmul,
    sparse_mlp,
    sparse_mlp_reference,
)
from esparse_jax.sparse import matmul as matmul_file
from esparse_jax.sparse.tune import decode_plans

DECODE, CHAIN = "esparse_decode24_cuda_v4", "esparse_chain24_cuda_v3"

needs_build = pytest.mark.skipif(
    not _ffi_cuda.decode_available(), reason="the extension was built without its CUDA part"
)
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX sees no NVIDIA GPU")


def _chain_operands(dtype, rows, *, shuffled, last, sizes=(128, 64, 256, 192)):
    """Operands of a chain: channels of the stream, features of attention, inner width, qkv."""
    channels, features, inner, qkv = sizes
    gate, up = (compressed24_of(random_blob((inner, channels), dtype, seed=s)) for s in (1, 2))
    weights = ChainWeights(
        o=random_blob((channels, features), dtype, seed=3),
        gate_up=blob24(interleave_gate_up(gate, up)),
        down=random_blob((channels, inner), dtype, seed=4),
        qkv=None if last else random_blob((qkv, channels), dtype, seed=5),
        gate_up_places=random_order(channels, 6) if shuffled else None,
        qkv_places=random_order(channels, 7) if shuffled else None,
    )
    return random_x(rows, features, dtype), random_x(rows, channels, dtype, seed=1), weights


@needs_build
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_lower_to_the_decode_kernel(rows, dtype):
    text = lowered_for_cuda(
        sparse_matmul, random_x(rows, 128, dtype), random_blob((64, 128), dtype)
    )
    assert text.count(DECODE) == 1
    assert "dot_general" not in text


@pytest.fixture
def no_library(monkeypatch):
    """As if cuSPARSELt, which takes more rows than the kernel, were not installed."""
    monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: "it is not installed.")
    jax.clear_caches()
    yield
    jax.clear_caches()


@needs_build
def test_many_rows_lower_to_plain_jax(no_library):
    text = lowered_for_cuda(sparse_matmul, random_x(17, 64), random_blob((64, 64)))
    assert DECODE not in text
    assert "dot_general" in text


@needs_build
def test_leading_axes_and_vmap_become_rows_of_one_call():
    blob = random_blob((64, 64))
    x = random_x(12, 64).reshape(3, 2, 2, 64)
    text = lowered_for_cuda(jax.vmap(lambda x: sparse_matmul(x, blob)), x)
    assert text.count(DECODE) == 1
    assert "tensor<12x64xf16>" in text


@needs_build
def test_an_mlp_lowers_to_one_call():
    text = lowered_for_cuda(
        lambda *a: sparse_mlp(*a, epsilon=1e-5),
        random_x(4, 64),
        random_blob((256, 64)),
        random_blob((64, 128)),
    )
    assert text.count(CHAIN) == 1
    assert "dot_general" not in text


@needs_build
def test_a_permutation_takes_a_scratch_result():
    text = lowered_for_cuda(
        lambda x, b, p: fused_matmul(x, b, permutation=p, norm_epsilon=1e-5),
        random_x(4, 64),
        random_blob((128, 64)),
        jnp.arange(64, dtype=jnp.int32),
    )
    assert text.count(DECODE) == 1
    assert "-> (tensor<4x128xf16>, tensor<4x64xf16>)" in text


@needs_build
def test_places_take_a_second_result():
    text = lowered_for_cuda(
        lambda x, b, p: fused_matmul(x, b, places=p),
        random_x(4, 64),
        random_blob((128, 64)),
        random_order(128),
    )
    assert text.count(DECODE) == 1
    assert "-> (tensor<4x128xf16>, tensor<4x128xf16>)" in text


@needs_build
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_chain_lowers_to_one_call(shuffled, last):
    attended, hidden, weights = _chain_operands(jnp.float16, 4, shuffled=shuffled, last=last)
    text = lowered_for_cuda(lambda *a: sparse_chain(*a, epsilon=1e-5), attended, hidden, weights)
    assert text.count(CHAIN) == 1
    assert "dot_general" not in text
    assert "gather" not in text


@needs_build
def test_a_chain_takes_plans_for_its_products(monkeypatch):
    plans = {"gate_up": {"tiles": 3, "resident": 2}, "qkv": {"warps": 16}}
    attended, hidden, weights = _chain_operands(jnp.float16, 3, shuffled=False, last=False)

    def lowered(records):
        monkeypatch.setattr(_ffi_cuda, "records_calls", lambda: records)
        chain = jax.jit(lambda *given: sparse_chain(*given, epsilon=1e-5, plans=plans))
        traced = chain.trace(attended, hidden, weights)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    each = re.findall(r"plan = dense<(.*?)> : tensor", lowered(True))
    assert each == ["0", "[3, 0, 0, 0, 0, 2]", "0", "[0, 16, 0, 0, 0, 0]"]
    assert lowered(False).count(", 3, 0, 0, 0, 0, 2, ") == 1
    with pytest.raises(ValueError, match="gate_up, down; got qkv as well"):
        sparse_mlp(hidden, weights.gate_up, weights.down, epsilon=1e-5, plans=plans)


@needs_build
def test_the_kernel_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="1 to 16 rows; got 17"):
        jax.eval_shape(
            lambda: sparse_matmul(random_x(17, 64), random_blob((64, 64)), backend="decode")
        )
    with pytest.raises(TypeError, match="device form"):
        sparse_matmul(random_x(1, 64), compressed24_of(random_blob((64, 64))), backend="decode")
    with pytest.raises(ValueError, match=r"plan has the fields .* got \['tile'\]"):
        _ffi_cuda.decode(random_x(1, 64), random_blob((64, 64)).data, out=64, plan={"tile": 1})


def test_without_the_cuda_part_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setattr(_ffi_cuda.native, "extension", lambda: None)
    assert not _ffi_cuda.decode_available()
    with pytest.raises(RuntimeError, match="ESPARSE_CUDA=ON"):
        _ffi_cuda.decode(random_x(1, 64), random_blob((64, 64)).data, out=64)


@pytest.fixture
def slow_paths(monkeypatch, caplog):
    """The lines logged about slow paths, as if JAX ran on a GPU."""
    monkeypatch.setattr(matmul_file.jax, "default_backend", lambda: "gpu")
    matmul_file._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]
    matmul_file._log_once.cache_clear()


@needs_build
def test_the_kernel_logs_nothing(slow_paths):
    jax.eval_shape(sparse_matmul, random_x(16, 192), random_blob((64, 192)))
    assert slow_paths() == []


@needs_build
@pytest.mark.parametrize(
    ("rows", "form", "line"), [(17, blob24, "up to 16 rows"), (1, lambda c: c, "device form")]
)
def test_a_slow_path_on_the_gpu_is_logged_once(no_library, slow_paths, rows, form, line):
    weight = form(compressed24_of(random_blob((64, 192))))
    for more in (0, 1):
        jax.eval_shape(sparse_matmul, random_x(rows + more, 192), weight)
    assert len(slow_paths()) == 1
    assert line in slow_paths()[0]


# ---- plain twins: what the kernels are compared with on a GPU, and the path everywhere else


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("function", [fused_matmul, fused_matmul_reference])
def test_fused_product_follows_the_formulas(function, dtype):
    shape, rows = (128, 192), 5
    blob, x = random_blob(shape, dtype), random_x(rows, shape[1], dtype)
    for variant in variants(rows, shape, dtype):
        want = slow_product(x, blob, **variant)
        assert relative(function(x, blob, **variant), want) < 1.5 * rounding(dtype)


def test_mlp_follows_the_formulas():
    gate, up = (compressed24_of(random_blob((128, 64), seed=seed)) for seed in (1, 2))
    gate_up, down = blob24(interleave_gate_up(gate, up)), random_blob((64, 128), seed=3)
    x = random_x(3, 64)
    hidden = slow_product(x, gate_up, norm_epsilon=1e-5, swiglu=True)
    want = slow_product(hidden, down, residual=x)
    for function in (sparse_mlp, sparse_mlp_reference):
        assert relative(function(x, gate_up, down, epsilon=1e-5), want) < 3 * rounding(x.dtype)


def _slow_chain(attended, hidden, weights, epsilon):
    hidden = slow_product(attended, weights.o, residual=hidden)

    def ordered(places):
        return None if places is None else np.argsort(np.asarray(places))

    order = ordered(weights.gate_up_places)
    inner = slow_product(
        hidden, weights.gate_up, permutation=order, norm_epsilon=epsilon, swiglu=True
    )
    hidden = slow_product(inner, weights.down, residual=hidden)
    if weights.qkv is None:
        return hidden, None
    order = ordered(weights.qkv_places)
    return hidden, slow_product(hidden, weights.qkv, permutation=order, norm_epsilon=epsilon)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_chain_follows_the_formulas(shuffled, last, dtype):
    attended, hidden, weights = _chain_operands(dtype, 3, shuffled=shuffled, last=last)
    want, want_qkv = _slow_chain(attended, hidden, weights, 1e-5)
    for function in (sparse_chain, sparse_chain_reference):
        got, qkv = function(attended, hidden, weights, epsilon=1e-5)
        assert relative(got, want) < 4 * rounding(dtype)
        assert (qkv is None) == last
        if not last:
            assert relative(qkv, want_qkv) < 4 * rounding(dtype)


def test_a_chain_that_does_not_fit_is_named():
    attended, hidden, weights = _chain_operands(jnp.float16, 3, shuffled=True, last=False)
    with pytest.raises(ValueError, match=r"residual must be \[row, out\] = \[3, 128\]"):
        sparse_chain(attended, hidden[:, :64], weights, epsilon=1e-5)
    wrong = dataclasses.replace(weights, qkv_places=random_order(64))
    with pytest.raises(ValueError, match="each of the 128 channels"):
        sparse_chain(attended, hidden, wrong, epsilon=1e-5)
    wrong = dataclasses.replace(weights, down=weights.o)
    with pytest.raises(ValueError, match=r"need down of shape \(128, 256\)"):
        sparse_chain(attended, hidden, wrong, epsilon=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"places": jnp.arange(64, dtype=jnp.int32)}, ValueError, "each of the 128 outputs"),
        (
            {"places": jnp.arange(128, dtype=jnp.int32), "swiglu": True},
            ValueError,
            "cannot stand together",
        ),
        ({"residual": jnp.ones((2, 64), jnp.float16)}, ValueError, "residual must be"),
        ({"residual": jnp.ones((2, 128), jnp.bfloat16)}, TypeError, "residual is bfloat16"),
        ({"permutation": jnp.arange(32)}, ValueError, "each of the 64 channels"),
        (
            {"residual": jnp.ones((2, 128), jnp.float16), "swiglu": True},
            ValueError,
            "cannot stand together",
        ),
    ],
)
def test_fused_product_names_what_does_not_fit(arguments, error, match):
    with pytest.raises(error, match=match):
        fused_matmul(random_x(2, 64), random_blob((128, 64)), **arguments)


def test_an_mlp_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"need down of shape \(64, 128\)"):
        sparse_mlp(random_x(2, 64), random_blob((256, 64)), random_blob((128, 64)), epsilon=1e-5)


# ---- on an NVIDIA GPU


@pytest.mark.gpu
@needs_gpu
@needs_build
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (128, 192), (2304, 448), (4096, 1792)])
def test_kernel_is_exact_to_the_rounding(shape, dtype):
    blob = random_blob(shape, dtype)
    for rows in (1, 3, 8, 9, 16):
        x = random_x(rows, shape[1], dtype)
        for variant in variants(rows, shape, dtype):
            got = jax.jit(functools.partial(fused_matmul, **variant))(x, blob)
            assert relative(got, slow_product(x, blob, **variant)) < 1.5 * rounding(dtype)


@pytest.mark.gpu
@needs_gpu
@needs_build
def test_every_plan_gives_the_same_product():
    shape = (2304, 448)
    blob = random_blob(shape)
    facts = {"out": shape[0], "channels": shape[1], "dtype": "float16"}
    hopper = jax.devices()[0].compute_capability == "9.0"
    plans = decode_plans()
    for rows in (1, 16):
        x = random_x(rows, shape[1])
        results = jax.jit(
            lambda x, data: [_ffi_cuda.decode(x, data, out=2304, plan=plan)[0] for plan in plans]
        )(x, blob.data)
        want = slow_product(x, blob)
        for plan, got in zip(plans, results, strict=True):
            used = _ffi_cuda._extension().decode_used_plan(
                rows=rows, plan=_ffi_cuda._plan(plan).tolist(), **facts
            )
            # Else this would be a test of other plans. Before Hopper more of them are too large.
            if hopper and plan["tiles"] * plan["warps"] * plan["blocks"] < 64:
                assert plan.items() <= used.items()
            assert relative(got, want) < 1.5 * rounding(x.dtype), plan


@pytest.mark.gpu
@needs_gpu
@needs_build
def test_mlp_in_one_call_equals_two_calls_bit_for_bit():
    gate_up, down = random_blob((1024, 256), seed=1), random_blob((256, 512), seed=2)
    x = random_x(4, 256)

    @jax.jit
    def both(x):
        hidden = fused_matmul(x, gate_up, norm_epsilon=1e-5, swiglu=True)
        two = fused_matmul(hidden, down, residual=x)
        return sparse_mlp(x, gate_up, down, epsilon=1e-5), two

    for _ in range(20):
        one, two = both(x)
        np.testing.assert_array_equal(one, two)


@pytest.mark.gpu
@needs_gpu
@needs_build
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 16])
def test_chain_on_the_gpu(rows, dtype):
    sizes = (1024, 512, 2752, 1536)
    for shuffled, last in ((False, False), (True, False), (True, True)):
        operands = _chain_operands(dtype, rows, shuffled=shuffled, last=last, sizes=sizes)
        want, want_qkv = _slow_chain(*operands, 1e-5)
        got, qkv = jax.jit(functools.partial(sparse_chain, epsilon=1e-5))(*operands)
        assert relative(got, want) < 4 * rounding(dtype)
        assert last or relative(qkv, want_qkv) < 4 * rounding(dtype)


@pytest.mark.gpu
@needs_gpu
@needs_build
@pytest.mark.parametrize("prefetch", [False, True])
def test_many_steps_with_overlap_give_the_same_bits(prefetch):
    """A race between the kernels of a long chain would show as other bits in some run."""
    attended, hidden, weights = _chain_operands(
        jnp.float16, 16, shuffled=True, last=False, sizes=(1024, 1024, 2752, 3072)
    )

    @functools.partial(jax.jit, static_argnums=3)
    def run(attended, hidden, weights, prefetch):
        seen = []
        for _ in range(16):
            hidden, qkv = sparse_chain(attended, hidden, weights, epsilon=1e-5, prefetch=prefetch)
            attended = jnp.tanh(qkv[:, :1024])
            seen.append(qkv)
        return hidden, seen

    @jax.jit
    def one_by_one(attended, hidden, weights):
        return jax.lax.optimization_barrier(sparse_chain(attended, hidden, weights, epsilon=1e-5))

    first = jax.tree.map(np.asarray, run(attended, hidden, weights, False))
    h, a = hidden, attended
    for step in range(16):
        h, qkv = one_by_one(a, h, weights)
        a = jnp.tanh(qkv[:, :1024])
        np.testing.assert_array_equal(first[1][step], qkv)
    for _ in range(50):
        again = run(attended, hidden, weights, prefetch)
        jax.tree.map(np.testing.assert_array_equal, first, jax.tree.map(np.asarray, again))


@pytest.mark.gpu
@needs_gpu
@needs_build
def test_a_weight_made_in_the_same_computation_is_read_when_it_is_there():
    ones, others = random_blob((4096, 1024), seed=1), random_blob((4096, 1024), seed=2)
    x = random_x(1, 1024)
    want = [np.asarray(sparse_matmul(x, blob)) for blob in (ones, others)]

    @jax.jit
    def run(x, ones, others, choice):
        results = []
        for step in range(24):
            # Written inside the computation, so no kernel may read it early.
            made = jnp.where(choice[step], ones.data, others.data)
            results.append(sparse_matmul(x, Blob24(made, ones.shape, ones.dtype)))
            x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
        return results

    for seed in range(30):
        choice = np.random.default_rng(seed).random(24) < 0.5
        for chosen, got in zip(choice, run(x, ones, others, choice), strict=True):
            np.testing.assert_array_equal(got, want[0 if chosen else 1])


@pytest.mark.gpu
@needs_gpu
@needs_build
def test_infinity_and_nan_reach_the_outputs_that_keep_their_channel():
    blob = random_blob((64, 64))
    dense = np.asarray(decompress24(compressed24_of(blob)))
    x = random_x(2, 64).at[0, 3].set(jnp.inf).at[1, 5].set(jnp.nan)
    y = np.asarray(sparse_matmul(x, blob, backend="decode"))
    np.testing.assert_array_equal(np.isinf(y[0]), dense[:, 3] != 0)
    np.testing.assert_array_equal(np.isnan(y[1]), dense[:, 5] != 0)
