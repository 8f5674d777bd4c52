"""The norm of many rows: what the inference model makes of it, what XLA is given, and on an NVIDIA
GPU the kernel itself."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esparse_jax import native
from esparse_jax.models import LlamaConfig, _ffi_norm, attention, inference
from esparse_jax.models._ffi_norm import add_norm, norm_takes
from esparse_jax.models.random_model import random_model

EPSILON = 1e-5
needs_cuda = pytest.mark.skipif(
    not native.has_cuda(), reason="the extension was built without its CUDA part"
)


def _operands(rows, channels, dtype, seed=0):
    """x, residual, gain and permutation; the second row is zeros."""
    random = np.random.default_rng(seed)
    x, residual = random.standard_normal((2, rows, channels)).astype(np.float32)
    if rows > 1:
        x[1] = residual[1] = 0
    gain = random.uniform(0.5, 2, channels).astype(np.float32)
    order = random.permutation(channels).astype(np.int32)
    return *(jnp.asarray(each, dtype) for each in (x, residual, gain)), jnp.asarray(order)


# ---- the model


@pytest.fixture
def calls(monkeypatch):
    """Whether a residual, a gain and a permutation were given, call by call, as if on a GPU.

    The model is computed on the CPU all the same, where plain JAX takes the kernel's place.
    """
    seen = []

    def watched(x, residual=None, **options):
        given = (residual, options["gain"], options["permutation"])
        seen.append(tuple(each is not None for each in given))
        return add_norm(x, residual, **options)

    monkeypatch.setattr(_ffi_norm, "_runs", lambda: True)
    monkeypatch.setattr(inference, "add_norm", watched)
    return seen


def _model(form, shuffle, **fields):
    config = LlamaConfig(64, 64, 128, 3, 4, num_key_value_heads=2)
    config = dataclasses.replace(config, dtype="float16", rms_norm_eps=0.1)
    model = random_model(config, form=form, shuffle=shuffle)
    norms = [norm for layer in model.model.layers for norm in (layer.input_norm, layer.mlp_norm)]
    for norm in norms:
        if norm is not None:  # else the gain is in the weights
            norm.scale.set_value(jnp.linspace(0.5, 2, 64).astype(fields.get("gain", "float16")))
    return model, norms


def _logits(model, rows, monkeypatch, kernel):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, rows)), jnp.int32)
    graphdef, state = nnx.split(model)
    with monkeypatch.context() as patch:
        if not kernel:
            patch.setattr(inference, "norm_takes", lambda *_: False)
        logits = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
        return np.asarray(logits(state, tokens), np.float32)


@pytest.mark.parametrize("shuffle", ["none", "within", "free"])
@pytest.mark.parametrize("form", ["portable", "device", "dense"])
def test_a_prompt_takes_the_kernel_where_it_took_a_norm(calls, monkeypatch, form, shuffle):
    model, norms = _model(form, shuffle)
    assert all((norm is None) == (form == "device") for norm in norms)
    want = _logits(model, 40, monkeypatch, kernel=False)
    assert not calls
    got = _logits(model, 40, monkeypatch, kernel=True)
    np.testing.assert_allclose(got, want, atol=1e-2 * np.abs(want).max())
    # Before q, k, v and before gate, up in each layer; only the very first adds nothing.
    assert [added for added, _, _ in calls] == [False] + [True] * 5
    assert all(scaled == (form != "device") for _, scaled, _ in calls)
    assert all(turned == (form != "dense" and shuffle != "none") for _, _, turned in calls)


@pytest.mark.parametrize(("rows", "number"), [(1, 0), (16, 0), (17, 6)])
@pytest.mark.parametrize("form", ["device", "dense"])
def test_few_rows_do_not_take_it(calls, monkeypatch, form, rows, number):
    model, _ = _model(form, "within")
    _logits(model, rows, monkeypatch, kernel=True)
    assert len(calls) == number


def test_a_gain_of_another_dtype_is_left_to_xla(calls, monkeypatch):
    model, _ = _model("dense", "none", gain="float32")
    want = _logits(model, 40, monkeypatch, kernel=False)
    np.testing.assert_array_equal(_logits(model, 40, monkeypatch, kernel=True), want)
    assert not calls


def test_it_has_a_derivative_and_is_mapped():
    x, residual, gain, order = _operands(20, 64, "float16")

    def loss(x, residual, gain):
        total, normed = add_norm(x, residual, gain=gain, permutation=order, epsilon=EPSILON)
        return jnp.sum(jnp.sin(normed.astype(jnp.float32)) + total.astype(jnp.float32))

    def plain(x, residual, gain):
        wide = (x + residual).astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=1, keepdims=True) + EPSILON)
        return jnp.sum(jnp.sin((wide * scale * gain[None])[:, order]) + wide)

    found = jax.grad(loss, argnums=(0, 1, 2))(x, residual, gain)
    for mine, theirs in zip(
        found, jax.grad(plain, argnums=(0, 1, 2))(x, residual, gain), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=2e-2 * np.abs(theirs).max())
    mapped = jax.vmap(lambda x: add_norm(x, residual, epsilon=EPSILON))(jnp.stack([x, 2 * x]))
    for both, one in zip(mapped, add_norm(2 * x, residual, epsilon=EPSILON), strict=True):
        np.testing.assert_array_equal(both[1], one)


def test_the_kernel_is_for_16_bits_many_rows_and_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(_ffi_norm, "_runs", lambda: True)
    attention.log_once.cache_clear()
    assert norm_takes("float16", 17, 4096)
    assert norm_takes(jnp.bfloat16, 2048, 24320)
    assert not norm_takes("float16", 16, 4096)
    assert not norm_takes("float32", 64, 4100)
    assert not caplog.records
    for channels in (4100, 24328, 4100):
        assert not norm_takes("float16", 64, channels)
    assert len(caplog.records) == 2
    assert "up to 24,320; here are 4,100" in caplog.text
    monkeypatch.setattr(_ffi_norm, "_runs", lambda: False)
    assert not norm_takes("float16", 64, 4096)


@needs_cuda
def test_the_norm_lowers_to_the_kernel():
    target = native.extension().CUDA_ROW_NORM_TARGET
    x, residual, gain, order = _operands(40, 64, "bfloat16")

    def lowered(**options):
        checks = [jax.export.DisabledSafetyCheck.custom_call(target)]
        jitted = jax.jit(lambda x, given: add_norm(x, epsilon=EPSILON, **given))
        exported = jax.export.export(jitted, platforms=["cuda"], disabled_checks=checks)
        return exported(x, options).mlir_module()

    row = "tensor<40x64xbf16>"
    text = lowered()
    assert f"({row}) -> {row}" in text
    assert "add = false" in text
    assert "epsilon = 9.99999974E-6 : f32" in text
    text = lowered(residual=residual, gain=gain, permutation=order)
    assert f"({row}, {row}, tensor<64xbf16>, tensor<64xi32>) -> ({row}, {row})" in text
    for attribute in ("add", "scale", "permute"):
        assert f"{attribute} = true" in text


# ---- the kernel


@pytest.mark.gpu
@pytest.mark.skipif(not _ffi_norm._runs(), reason="no NVIDIA GPU, or no CUDA part")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "channels"),
    [(1, 8), (17, 64), (3, 2056), (1001, 4096), (6, 6144), (130, 8192), (5, 24320)],
)
def test_the_kernel(rows, channels, dtype):
    x, residual, gain, order = _operands(rows, channels, dtype)
    eps = float(jnp.finfo(dtype).eps)
    choices = {"residual": residual, "gain": gain, "permutation": order}
    for present in itertools.product((False, True), repeat=3):
        given = {name: choices[name] for name, there in zip(choices, present, strict=True) if there}
        total, normed = jax.jit(lambda x, given: add_norm(x, epsilon=EPSILON, **given))(x, given)
        exact = x if "residual" not in given else x + residual
        np.testing.assert_array_equal(
            np.asarray(total).view(np.int16), np.asarray(exact).view(np.int16)
        )
        wide = np.asarray(exact, np.float64)
        want = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + EPSILON)
        if "gain" in given:
            want = want * np.asarray(gain, np.float64)
        if "permutation" in given:
            want = want[:, np.asarray(order)]
        # One rounding, and a little for sums and root.
        np.testing.assert_allclose(np.asarray(normed, np.float64), want, rtol=0.51 * eps, atol=1e-6)
