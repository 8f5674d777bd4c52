"""`sparse_matmul` by cuSPARSELt, and the weights it reads: on any machine.

What it computes goes through a stand-in on the CPU platform; what is lowered for CUDA is read.
"""

import functools
import logging

import fake_cusparselt
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_cusparselt import assert_product, random_x, weight24
from jax.sharding import PartitionSpec as P
from lowering import lowered_for_cuda

from esparse_jax.sparse import (
    Algorithm,
    Blob24,
    LibraryBlob24,
    _ffi,
    _ffi_cuda,
    _ffi_cusparselt,
    blob24,
    compress24,
    device_blob24,
    library_blob_agrees,
    sparse_matmul,
)
from esparse_jax.sparse import blob as blob_file
from esparse_jax.sparse import matmul as matmul_file

MATMUL, DECODE = "esparse_cusparselt_matmul_cuda_v1", "esparse_decode24_cuda_v4"
by_library = functools.partial(sparse_matmul, backend="cusparselt")

needs_extension = pytest.mark.skipif(
    not _ffi.cpu_product_available(), reason="the extension is not built (BUILD.md)"
)


@pytest.fixture(autouse=True)
def traced_anew():
    """What was traced with another library, or none, is forgotten."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def _packed(shape=(64, 128), dtype="float16", seed=0):
    return compress24(weight24(shape, dtype, seed))


def _logged(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("esparse_jax")]


# ---- the product, through the stand-in


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (3, 1, 20), (0, 2)])
def test_leading_axes_are_rows(fake, dtype, batch):
    weight = weight24((64, 128), dtype)
    x = random_x(*batch, 128, dtype=dtype)
    y = by_library(x, blob24(compress24(weight)))
    assert (y.shape, y.dtype) == ((*batch, 64), x.dtype)
    assert_product(y, x, weight)


def test_vmap_over_x_is_one_call_with_more_rows(fake):
    weight = weight24((64, 128), "float16")
    blob, x = blob24(compress24(weight)), random_x(2, 3, 4, 128)
    y = jax.jit(jax.vmap(jax.vmap(lambda x: by_library(x, blob))))(x)
    assert_product(y, x, weight)
    assert (fake.calls("Matmul"), fake.last("rows")) == (1, 24)


def test_vmap_over_weights_takes_one_after_the_other(fake):
    weights = jnp.stack([weight24((64, 128), "float16", seed) for seed in range(3)])
    blobs = jax.vmap(lambda weight: blob24(compress24(weight)))(weights)
    x = random_x(3, 5, 128)
    for arguments, axes in (((x, blobs), (0, 0)), ((x[0], blobs), (None, 0))):
        y = jax.jit(jax.vmap(by_library, in_axes=axes))(*arguments)
        for i in range(3):
            assert_product(y[i], x[i] if axes[0] == 0 else x[0], weights[i])


def test_scan_and_while_over_layers(fake):
    weights = jnp.stack([weight24((64, 64), "bfloat16", seed) for seed in range(3)])
    blobs = jax.vmap(lambda weight: blob24(compress24(weight)))(weights)
    x = random_x(4, 64, dtype="bfloat16")

    @jax.jit
    def scanned(x, blobs):
        return jax.lax.scan(lambda x, blob: (by_library(x, blob), None), x, blobs)[0]

    @jax.jit
    def repeated(x, blobs):
        def layer(state):
            i, x = state
            return i + 1, by_library(x, jax.tree.map(lambda leaf: leaf[i], blobs))

        return jax.lax.while_loop(lambda state: state[0] < 3, layer, (0, x))[1]

    want = x
    for i in range(3):
        want = by_library(want, jax.tree.map(lambda leaf: leaf[i], blobs))  # noqa: B023
    np.testing.assert_array_equal(scanned(x, blobs), want)
    np.testing.assert_array_equal(repeated(x, blobs), want)


@pytest.mark.parametrize("shape", [(64, 128), (80, 48)])
def test_gradients_are_those_of_the_dense_product(fake, shape):
    weight = weight24(shape, "float16")
    blob, x = device_blob24(compress24(weight)), random_x(2, 5, shape[1])

    def loss(product):
        return jax.grad(lambda x: jnp.sum(jnp.sin(product(x).astype(jnp.float32))))(x)

    got = loss(lambda x: by_library(x, blob)).astype(jnp.float32)
    want = loss(lambda x: x @ weight.T).astype(jnp.float32)
    exact = jax.grad(lambda x: jnp.sum(jnp.sin(x @ weight.astype(jnp.float32).T)))(
        x.astype(jnp.float32)
    )
    assert np.abs(got - exact).max() <= 2 * np.abs(want - exact).max()


def test_an_algorithm_is_taken_where_the_library_multiplies(fake):
    weight = weight24((64, 128), "float16")
    blob, x = blob24(compress24(weight)), random_x(20, 128)
    for backend, id in (("cusparselt", 3), (None, 5)):
        y = sparse_matmul(x, blob, backend=backend, algorithm=Algorithm(id=id))
        assert_product(y, x, weight)
        assert fake.last("algorithm") == id


def test_without_a_backend_many_rows_take_the_library(fake, no_prefill, caplog):
    weight = weight24((64, 128), "float16")
    blob = blob24(compress24(weight))
    matmul_file._log_untuned.cache_clear()
    with caplog.at_level(logging.WARNING):
        # Its agreement is asked for while this is traced.
        y = jax.jit(jax.vmap(lambda x: sparse_matmul(x, blob)))(random_x(4, 5, 128))
    assert_product(y, random_x(4, 5, 128), weight)
    assert (fake.calls("Matmul"), fake.last("rows")) == (1, 24)
    (line,) = _logged(caplog)
    assert "no float16 product near to one of this many rows was measured on this GPU" in line


# ---- which bytes it reads


def test_the_layouts_agree_and_are_compared_once(fake):
    assert library_blob_agrees()
    compressed = fake.calls("SpMMACompress2")
    assert compressed == 2  # one probe per dtype
    assert library_blob_agrees()
    for shape in ((64, 64), (192, 128)):
        assert isinstance(device_blob24(_packed(shape)), Blob24)
    assert fake.calls("SpMMACompress2") == compressed


def test_another_layout_is_a_form_of_its_own(fake, caplog):
    fake.set("scrambled", 1)
    weight = weight24((64, 128), "bfloat16")
    packed, x = compress24(weight), random_x(20, 128, dtype="bfloat16")
    with caplog.at_level(logging.WARNING):
        assert not library_blob_agrees()
        blob = jax.jit(device_blob24)(packed)
        device_blob24(packed)
    (line,) = _logged(caplog)
    assert "cuSPARSELt 0.8.0 on sm_90 lays 2:4 weights out in a way of its own" in line
    assert isinstance(blob, LibraryBlob24)
    assert (blob.made_by, blob.shape, blob.dtype) == ((800, 90), (64, 128), packed.dtype)
    assert blob.nbytes == blob.data.size == blob24(packed).nbytes
    assert np.any(np.asarray(blob.data) != np.asarray(blob24(packed).data))
    for backend in (None, "cusparselt"):
        for rows in (1, 20):
            assert_product(sparse_matmul(x[:rows], blob, backend=backend), x[:rows], weight)


def test_another_layout_is_never_read_as_ours(fake, no_prefill, monkeypatch, caplog):
    fake.set("scrambled", 1)
    weight = weight24((64, 128), "float16")
    blob, x = blob24(compress24(weight)), random_x(20, 128)
    with pytest.raises(
        RuntimeError, match=r"does not read a Blob24.*with esparse_jax\.sparse\.device_blob24"
    ):
        by_library(x, blob)
    monkeypatch.setattr(matmul_file.jax, "default_backend", lambda: "gpu")
    matmul_file._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert_product(sparse_matmul(x, blob), x, weight)  # by plain JAX, or the CPU's product
    matmul_file._log_once.cache_clear()
    assert fake.calls("Matmul") == 0
    assert sum("it does not read the weight on this GPU" in line for line in _logged(caplog)) == 1


def test_the_librarys_form_is_read_by_nothing_else(fake):
    blob = device_blob24(_packed((80, 48)))
    for backend in ("reference", "cpu", "decode", "prefill"):
        with pytest.raises(TypeError, match=f"read by cuSPARSELt alone; got backend='{backend}'"):
            sparse_matmul(random_x(1, 48), blob, backend=backend)


def test_the_fused_products_refuse_the_librarys_form():
    """In a process without the type checks of these tests, which would be the first to refuse."""
    program = """
        import jax.numpy as jnp, numpy as np
        from esparse_jax.sparse import LibraryBlob24, fused_matmul, sparse_mlp
        data, x = jnp.zeros(64 * 64 * 9 // 8, jnp.uint8), jnp.zeros((1, 64), jnp.float16)
        blob = LibraryBlob24(data, (64, 64), np.dtype(np.float16), (800, 90))
        for call in (fused_matmul, lambda x, blob: sparse_mlp(x, blob, blob, epsilon=1e-5)):
            try:
                call(x, blob)
            except TypeError as error:
                print(error)
    """
    said = fake_cusparselt.run(program).splitlines()
    assert len(said) == 2
    assert all("LibraryBlob24, whose layout only cuSPARSELt knows" in line for line in said)


def test_a_form_of_another_gpu_is_refused_when_it_runs(fake):
    fake.set("scrambled", 1)
    blob = device_blob24(_packed())
    fake.set("architecture", 89)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"0\.8\.0 on sm_90; here it is 0\.8\.0 on"
    ):
        sparse_matmul(random_x(20, 128), blob).block_until_ready()


def test_what_cannot_be_asked_is_not_used(fake, caplog):
    fake.fail("Init", status=1)
    with caplog.at_level(logging.WARNING):
        assert not library_blob_agrees()
        assert isinstance(device_blob24(_packed()), Blob24)
    (line,) = _logged(caplog)
    assert "could not compress a probe and is not used: cusparseLtInit" in line


@pytest.mark.parametrize("shape", [(80, 48), (16, 64), (64, 16), (48, 80)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_sizes_go_through_the_library(fake, shape, dtype):
    weight = weight24(shape, dtype)
    blob = device_blob24(compress24(weight))
    assert isinstance(blob, LibraryBlob24)
    for rows in (1, 9):
        x = random_x(rows, shape[1], dtype=dtype)
        assert_product(sparse_matmul(x, blob), x, weight)


def test_forms_of_stacked_layers(fake):
    weights = jnp.stack([weight24((80, 48), "float16", seed) for seed in range(2)])
    blobs = jax.jit(jax.vmap(device_blob24))(jax.vmap(compress24)(weights))
    x = random_x(3, 48)
    y = jax.lax.map(lambda blob: sparse_matmul(x, blob), blobs)
    for i in range(2):
        assert_product(y[i], x, weights[i])


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        (
            (72, 64),
            "float16",
            ValueError,
            r"\(72, 64\) is not made of multiples of 16, which cuSPA",
        ),
        ((64, 8), "bfloat16", ValueError, r"\(64, 8\) is not made of multiples of 16"),
        ((64, 64), "float32", TypeError, "float32, and only float16 and bfloat16"),
        ((80, 64), "float32", TypeError, "float32, and only float16 and bfloat16"),
    ],
)
def test_what_has_no_form_is_refused(fake, shape, dtype, error, message):
    with pytest.raises(error, match=message):
        device_blob24(_packed(shape, dtype))


def test_wrong_operands_are_named(fake):
    blob = device_blob24(_packed((80, 48)))
    with pytest.raises(ValueError, match="48 input channels"):
        sparse_matmul(random_x(1, 64), blob)
    with pytest.raises(TypeError, match=r"x\.astype\(float16\)"):
        sparse_matmul(random_x(1, 48, dtype="bfloat16"), blob)
    with pytest.raises(
        TypeError, match=r"'cusparselt' .* device form .*Compressed24.*device_blob24"
    ):
        sparse_matmul(random_x(1, 48), _packed((80, 48)), backend="cusparselt")
    with pytest.raises(ValueError, match=r"algorithm is cuSPARSELt's.*got backend='reference'"):
        sparse_matmul(
            random_x(1, 128), blob24(_packed()), backend="reference", algorithm=Algorithm()
        )


# ---- what is lowered for CUDA, where no GPU can be asked


@pytest.fixture
def no_gpu(monkeypatch):
    """As on a machine without a GPU, whatever this one has."""
    monkeypatch.setattr(_ffi_cusparselt, "device", lambda: None)


@pytest.fixture
def installed(no_gpu, monkeypatch):
    """As if the library could be opened there."""
    library = _ffi_cusparselt.OpenedLibrary(800, "libcusparseLt.so.0")
    monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: library)


@pytest.fixture
def missing(no_gpu, monkeypatch):
    """As if the library could not be opened."""
    monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: "it is not installed.")


@needs_extension
@pytest.mark.parametrize("state", ["installed", "missing"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_is_exported_without_the_library_and_without_a_gpu(request, state, dtype):
    request.getfixturevalue(state)
    x, blob = random_x(17, 128, dtype=dtype), blob24(_packed(dtype=dtype))
    text = lowered_for_cuda(by_library, x, blob)
    assert text.count(f"@{MATMUL}") == 1
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    assert f"(tensor<24x128x{short}>, tensor<9216xui8>)" in text
    assert f"-> (tensor<24x64x{short}>, tensor<{8 << 20}xui8>)" in text
    assert "readers = dense<800090>" in text
    assert "dot_general" not in text


@needs_extension
def test_the_algorithm_is_in_the_computation(missing):
    algorithm = Algorithm(
        id=17, split_k=-1, split_k_mode=2, split_k_buffers=3, workspace_bytes=4096
    )
    text = lowered_for_cuda(
        functools.partial(by_library, algorithm=algorithm), random_x(8, 128), blob24(_packed())
    )
    for attribute in ("algorithm = 17", "split_k = -1", "split_k_mode = 2", "split_k_buffers = 3"):
        assert f"{attribute} : i32" in text
    assert "tensor<4096xui8>" in text
    assert "stablehlo.pad" not in text


@needs_extension
def test_rows_choose_between_kernel_and_library(installed, monkeypatch):
    blob = blob24(_packed())
    assert lowered_for_cuda(sparse_matmul, random_x(17, 128), blob).count(f"@{MATMUL}") == 1
    for kernel, target in ((True, DECODE), (False, MATMUL)):
        monkeypatch.setattr(_ffi_cuda, "decode_available", lambda: kernel)  # noqa: B023
        monkeypatch.setattr(
            _ffi_cuda,
            "decode",
            lambda x, data, out, **_: (jnp.zeros((16, out), x.dtype), None),
        )
        jax.clear_caches()
        text = lowered_for_cuda(sparse_matmul, random_x(16, 128), blob)
        assert text.count(f"@{MATMUL}") == (target == MATMUL)
        assert "dot_general" not in text


@needs_extension
def test_without_the_library_many_rows_lower_to_plain_jax(missing, monkeypatch, caplog):
    monkeypatch.setattr(matmul_file.jax, "default_backend", lambda: "gpu")
    matmul_file._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for rows in (17, 18):
            text = lowered_for_cuda(sparse_matmul, random_x(rows, 128), blob24(_packed()))
            assert MATMUL not in text
            assert "dot_general" in text
    matmul_file._log_once.cache_clear()
    (line,) = _logged(caplog)
    assert "decode kernel takes up to 16 rows, and cuSPARSELt, which takes any number" in line
    assert "(it is not installed.)" in line


@needs_extension
def test_with_a_gpu_a_missing_library_is_an_error(missing, monkeypatch):
    monkeypatch.setattr(_ffi_cusparselt, "device", lambda: jax.devices()[0])
    with pytest.raises(RuntimeError, match=r"it is not installed\. Install it beside jax"):
        jax.eval_shape(lambda: by_library(random_x(17, 128), blob24(_packed())))
    with pytest.raises(ValueError, match=r"cuSPARSELt would take it, but it is not installed\."):
        device_blob24(_packed((80, 48)))


@needs_extension
def test_leading_axes_and_vmap_become_rows_of_one_call(installed):
    blob, x = blob24(_packed()), random_x(3, 2, 4, 128)
    text = lowered_for_cuda(jax.vmap(lambda x: by_library(x, blob)), x)
    assert text.count(f"@{MATMUL}") == 1
    assert "(tensor<24x128xf16>, " in text


@needs_extension
def test_scan_while_and_shard_map_lower_for_cuda(installed):
    """Over the mesh of devices that are not here."""
    mesh = jax.sharding.AbstractMesh((2,), ("model",), (jax.sharding.AxisType.Auto,))
    blobs = Blob24(jax.ShapeDtypeStruct((2, 9216), jnp.uint8), (64, 128), np.dtype(np.float16))
    x = jax.ShapeDtypeStruct((20, 128), jnp.float16)

    def shard(x, blobs):
        blob = jax.tree.map(lambda leaf: leaf[0], blobs)
        start = jnp.zeros_like(by_library(x, blob))

        def step(carry, _):
            return carry + by_library(x, blob), None

        def more(state):
            return state[0] + 1, state[1] + by_library(x, blob)

        y = jax.lax.scan(step, start, None, length=3)[0]
        return jax.lax.while_loop(lambda state: state[0] < 2, more, (0, y))[1]

    specs = (P(), Blob24(P("model"), blobs.shape, blobs.dtype))
    run = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P(None, "model")))
    text = run.trace(x, blobs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{MATMUL}") == 2  # in the bodies of the two loops
    assert text.count("stablehlo.while") == 2


@needs_extension
@pytest.mark.parametrize("made_by", [None, (801, 80)])
def test_it_cannot_be_lowered_for_another_platform(installed, made_by):
    blob = blob24(_packed())
    if made_by is not None:
        blob = LibraryBlob24(blob.data, blob.shape, blob.dtype, made_by)
        text = lowered_for_cuda(sparse_matmul, random_x(1, 128), blob)
        assert "readers = dense<801080>" in text
    with pytest.raises(NotImplementedError, match=r"'cuda'; .* compiled for 'cpu'"):
        jax.jit(by_library).trace(random_x(20, 128), blob).lower(lowering_platforms=("cpu",))


def test_the_layout_is_known_where_it_was_read_out(no_gpu):
    assert blob_file.blob24_readers() == (800090,)
    assert not library_blob_agrees()
    assert isinstance(device_blob24(_packed()), Blob24)
