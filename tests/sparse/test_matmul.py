"""`sparse_matmul`: the same product by every way, under every transformation."""

import functools
import inspect
import logging
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from esparse_jax import native
from esparse_jax.sparse import (
    Compressed24,
    _ffi,
    compress24,
    decompress24,
    matmul,
    sparse_matmul,
    sparse_matmul_reference,
)

OUT, CHANNELS = 24, 36
needs_extension = pytest.mark.skipif(
    not _ffi.cpu_product_available(), reason="the extension is not built (BUILD.md)"
)
BACKENDS = (None, "reference", pytest.param("cpu", marks=needs_extension))


def masked_weight(out: int = OUT, channels: int = CHANNELS, dtype="float32", seed=0) -> jax.Array:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((out, channels // 4, 4)).astype(np.float32)
    weight[random.random(weight.shape).argsort(axis=2) >= 2] = 0
    return jnp.asarray(weight.reshape(out, channels), dtype)


def random_x(*shape: int, dtype="float32", seed=1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def dense_product(x, weight):
    """The product in float64, whatever the dtypes."""
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (3, 1, 20)])
def test_no_worse_than_a_dense_product(backend, dtype, batch):
    weight = masked_weight(dtype=dtype)
    x = random_x(*batch, CHANNELS, dtype=dtype)
    y = sparse_matmul(x, compress24(weight), backend=backend)
    assert y.shape == (*batch, OUT)
    assert y.dtype == x.dtype
    true = dense_product(x, weight)
    plain = np.abs(np.asarray(x @ weight.T, np.float64) - true).max()
    ours = np.abs(np.asarray(y, np.float64) - true).max()
    # XLA's dense product is one sample of the rounding errors: float32 sums of 18 terms.
    assert ours <= 2 * plain + 18 * np.finfo(np.float32).eps * np.abs(true).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    packed = compress24(masked_weight())
    assert sparse_matmul(jnp.zeros((0, CHANNELS)), packed, backend=backend).shape == (0, OUT)
    assert sparse_matmul(jnp.zeros((2, 0, CHANNELS)), packed, backend=backend).shape == (2, 0, OUT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_dense_product(backend):
    packed = compress24(masked_weight())
    x = random_x(2, 5, CHANNELS)

    def sparse(x, values):
        with_values = Compressed24(values, packed.indices, packed.shape)
        return jnp.sum(jnp.sin(sparse_matmul(x, with_values, backend=backend)))

    def dense(x, values):
        weight = decompress24(Compressed24(values, packed.indices, packed.shape))
        return jnp.sum(jnp.sin(x @ weight.T))

    got = jax.jit(jax.grad(sparse, argnums=(0, 1)))(x, packed.values)
    expected = jax.grad(dense, argnums=(0, 1))(x, packed.values)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_x_weights_and_both(backend):
    weights = jnp.stack([masked_weight(seed=seed) for seed in range(3)])
    packed = jax.vmap(compress24)(weights)
    one = jax.tree.map(lambda leaf: leaf[0], packed)
    x = random_x(3, 5, CHANNELS)
    product = functools.partial(sparse_matmul, backend=backend)
    for arguments, axes, expected in (
        ((x, one), (0, None), dense_product(x, weights[0])),
        ((x[0], packed), (None, 0), np.stack([dense_product(x[0], w) for w in weights])),
        (
            (x, packed),
            (0, 0),
            np.stack([dense_product(a, w) for a, w in zip(x, weights, strict=True)]),
        ),
    ):
        y = jax.jit(jax.vmap(product, in_axes=axes))(*arguments)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    columns = jax.vmap(product, in_axes=(1, None), out_axes=1)(x, one)
    np.testing.assert_allclose(columns, dense_product(x, weights[0]), rtol=1e-5, atol=1e-5)


@needs_extension
def test_vmap_over_x_is_one_call_with_more_rows():
    packed = compress24(masked_weight())
    product = jax.vmap(
        jax.vmap(functools.partial(sparse_matmul, backend="cpu"), (0, None)), (0, None)
    )
    text = jax.jit(product).lower(random_x(2, 3, 4, CHANNELS), packed).as_text()
    assert text.count("stablehlo.custom_call") == 1
    assert f"tensor<24x{CHANNELS}xf32>" in text
    assert "stablehlo.while" not in text


def test_gradient_of_vmap_and_vmap_of_gradient():
    packed = compress24(masked_weight())
    x = random_x(3, 5, CHANNELS)

    def one(x):
        return jnp.sum(sparse_matmul(x, packed) ** 2)

    whole = jax.grad(lambda x: jnp.sum(jax.vmap(one)(x)))(x)
    each = jax.vmap(jax.grad(one))(x)
    np.testing.assert_allclose(whole, each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_over_stacked_layers(backend):
    weights = jnp.stack([masked_weight(CHANNELS, CHANNELS, seed=seed) for seed in range(3)])
    packed = jax.vmap(compress24)(weights)

    @jax.jit
    def run(x, packed):
        def layer(x, packed):
            return sparse_matmul(x, packed, backend=backend), None

        return jax.lax.scan(layer, x, packed)[0]

    expected = random_x(4, CHANNELS)
    y = run(expected, packed)
    for weight in weights:
        expected = expected @ weight.T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_shard_map_over_rows_outputs_and_channels():
    """On two CPU devices, which a process must ask for before it has any: in one of its own."""
    program = """
        import functools
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from esparse_jax.sparse import Compressed24, compress24, sparse_matmul

        assert jax.device_count() == 2
        mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        random = np.random.default_rng(0)
        weight = random.standard_normal((24, 32)).astype(np.float32)
        weight.reshape(24, 8, 4)[:, :, 1:3] = 0
        packed = compress24(jnp.asarray(weight))
        x = jnp.asarray(random.standard_normal((6, 32)), jnp.float32)

        def sharded(product, x_spec, spec, y_spec):
            specs = (x_spec, Compressed24(spec, spec, packed.shape))
            return jax.jit(jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=y_spec))

        def summed(x, packed):
            return jax.lax.psum(sparse_matmul(x, packed), "model")

        def repeated(x, packed):
            def step(carry, _):
                return carry + sparse_matmul(x, packed), None
            start = jnp.zeros_like(sparse_matmul(x, packed))
            return jax.lax.scan(step, start, None, length=1)[0]

        for product, x_spec, spec, y_spec in (
            (sparse_matmul, P("model"), P(), P("model")),
            (sparse_matmul, P(), P("model"), P(None, "model")),
            (summed, P(None, "model"), P(None, "model"), P()),
            (repeated, P("model"), P(), P("model")),
        ):
            run = sharded(product, x_spec, spec, y_spec)
            np.testing.assert_allclose(run(x, packed), x @ weight.T, rtol=1e-4, atol=1e-4)

        def loss(x, packed):
            y = sharded(sparse_matmul, P("model"), P(), P("model"))(x, packed)
            return jnp.sum(y ** 2)

        dense = jax.grad(lambda x: jnp.sum((x @ weight.T) ** 2))(x)
        np.testing.assert_allclose(jax.grad(loss)(x, packed), dense, rtol=1e-4, atol=1e-4)
        print("passed")
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)],
        env={**_environment(), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "passed", done.stderr


def _environment() -> dict[str, str]:
    """This process's, with its import path: the package may not be installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}


def test_lowers_for_cuda_on_any_machine():
    packed = compress24(masked_weight())
    x = random_x(3, CHANNELS)
    exported = export.export(jax.jit(sparse_matmul), platforms=["cuda"])(x, packed)
    assert exported.platforms == ("cuda",)
    assert "esparse_product24_cpu" not in exported.mlir_module()
    assert "dot_general" in exported.mlir_module()


@needs_extension
def test_exported_for_the_cpu_it_is_the_custom_call():
    packed = compress24(masked_weight())
    x = random_x(3, CHANNELS)
    allowed = [export.DisabledSafetyCheck.custom_call(native.extension().PRODUCT24_CPU)]
    exported = export.export(
        jax.jit(sparse_matmul), platforms=["cpu", "cuda"], disabled_checks=allowed
    )(x, packed)
    assert native.extension().PRODUCT24_CPU in exported.mlir_module()
    np.testing.assert_allclose(
        exported.call(x, packed), dense_product(x, masked_weight()), rtol=1e-5, atol=1e-5
    )


@needs_extension
def test_forcing_the_cpu_product_forbids_other_platforms():
    packed = compress24(masked_weight())
    product = jax.jit(functools.partial(sparse_matmul, backend="cpu"))
    refusal = r"backend='cpu' is for the platform 'cpu'; .* compiled for 'cuda'\. Leave backend out"
    with pytest.raises(NotImplementedError, match=refusal):
        product.trace(random_x(3, CHANNELS), packed).lower(lowering_platforms=("cuda",))


@needs_extension
@pytest.mark.parametrize(("level", "rows"), [("avx2", 129), ("portable", 17)])
def test_without_avx512_many_rows_take_the_dense_product(monkeypatch, level, rows):
    monkeypatch.setattr(_ffi, "cpu_levels", lambda: (level, "portable"))
    weight = masked_weight()
    packed = compress24(weight)
    few, many = random_x(rows - 1, CHANNELS), random_x(rows, CHANNELS)
    chosen = jax.jit(matmul._cpu)
    extension = native.extension()
    assert extension.PRODUCT24_CPU in chosen.lower(few, packed.values, packed.indices).as_text()
    text = chosen.lower(many, packed.values, packed.indices).as_text()
    assert extension.PRODUCT24_CPU not in text
    assert extension.EXPAND24_CPU in text
    y = chosen(many, packed.values, packed.indices)
    np.testing.assert_allclose(y, dense_product(many, weight), rtol=1e-5, atol=1e-5)


@pytest.fixture
def no_extension(monkeypatch):
    """As if the package had been installed without its compiled part."""
    monkeypatch.setattr(native, "_EXTENSION", "esparse_jax._not_built")
    native.extension.cache_clear()
    jax.clear_caches()
    yield
    monkeypatch.undo()
    native.extension.cache_clear()
    jax.clear_caches()


def test_without_the_extension_one_line_is_logged(no_extension, caplog):
    weight = masked_weight()
    packed = compress24(weight)
    with caplog.at_level(logging.WARNING, logger="esparse_jax"):
        for rows in (1, 2):
            x = random_x(rows, CHANNELS)
            np.testing.assert_allclose(
                sparse_matmul(x, packed), dense_product(x, weight), rtol=1e-5, atol=1e-5
            )
    missing = [r.getMessage() for r in caplog.records if "_not_built" in r.getMessage()]
    assert len(missing) == 1
    assert "pip install ." in missing[0]


def test_without_the_extension_its_backend_is_refused(no_extension):
    packed = compress24(masked_weight())
    with pytest.raises(
        RuntimeError, match=r'backend="cpu" needs the compiled extension, .*BUILD.md'
    ):
        sparse_matmul(random_x(1, CHANNELS), packed, backend="cpu")


def test_wrong_number_of_channels():
    packed = compress24(masked_weight())
    with pytest.raises(
        ValueError, match=r"36 input channels; got shape \(2, 32\).*dense shape \(24, 36\)"
    ):
        sparse_matmul(random_x(2, 32), packed)


def test_wrong_indices():
    packed = compress24(masked_weight())
    cut = Compressed24(packed.values, packed.indices[:, :-1], packed.shape)
    with pytest.raises(ValueError, match=r"need indices uint8\[24, 5\]; got uint8\[24, 4\]"):
        sparse_matmul(random_x(2, CHANNELS), cut)


def test_other_dtypes_are_not_converted():
    packed = compress24(masked_weight(dtype="bfloat16"))
    with pytest.raises(TypeError, match=r"x is float32 and .* bfloat16.*x\.astype\(bfloat16\)"):
        sparse_matmul(random_x(2, CHANNELS), packed)


def test_reference_by_name_is_the_reference():
    packed = compress24(masked_weight())
    x = random_x(2, CHANNELS)
    np.testing.assert_array_equal(
        sparse_matmul_reference(x, packed), sparse_matmul(x, packed, backend="reference")
    )


@pytest.mark.parametrize("backend", [None, "cpu", "decode"])
def test_a_dense_weight_is_told_to_be_compressed_first(backend):
    untyped = inspect.unwrap(sparse_matmul)  # the annotations refuse it first
    with pytest.raises(TypeError, match=r"a compressed weight; got .*compress24\(weight\)"):
        untyped(jnp.ones((2, 64)), jnp.zeros((64, 64)), backend=backend)
