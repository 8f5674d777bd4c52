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
from esparse_jax.models import LlamaConfig, _ffi_norm, inference
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


def _plain(x, residual=None, *, gain=None, permutation=None, epsilon=EPSILON):
    total = x if residual is None else x + residual
    wide = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=1, keepdims=True) + epsilon)
    normed = wide * (scale if gain is None else scale * gain.astype(jnp.float32)[None])
    normed = normed.astype(x.dtype)
    return total, normed if permutation is None else normed[:, permutation]


# ---- the model


@pytest.mark.parametrize("shuffle", ["none", "within", "free"])
@pytest.mark.parametrize("form", ["portable", "device", "dense"])
def test_a_prompt_takes_the_kernel_where_it_took_a_norm(monkeypatch, form, shuffle):
    """The kernel's part is played by plain JAX."""
    config = LlamaConfig(64, 64, 128, 3, 4, num_key_value_heads=2)
    dtype, rtol = ("float16", 2e-2) if form == "device" else ("float32", 1e-4)
    config = dataclasses.replace(config, dtype=dtype, rms_norm_eps=0.1)
    model = random_model(config, form=form, shuffle=shuffle)
    norms = [norm for layer in model.model.layers for norm in (layer.input_norm, layer.mlp_norm)]
    assert all((norm is None) == (form == "device") for norm in norms)
    for norm in norms:
        if norm is not None:  # else the gain is in the weights
            norm.scale[...] = jnp.linspace(0.5, 2, 64)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 20)), jnp.int32)
    graphdef, state = nnx.split(model)

    def logits():
        return jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))(state, tokens)

    want, taken = logits(), []

    def played(x, residual=None, **options):
        taken.append(
            (residual is not None, options["gain"] is not None, options["permutation"] is not None)
        )
        return _plain(x, residual, **options)

    monkeypatch.setattr(inference, "norm_takes", lambda dtype, channels: True)
    monkeypatch.setattr(inference, "add_norm", played)
    np.testing.assert_allclose(logits(), want, rtol=rtol, atol=rtol * np.abs(want).max())
    # Before q, k, v and before gate, up in each layer; only the very first adds nothing.
    assert [added for added, _, _ in taken] == [False] + [True] * 5
    assert all(scaled == (form != "device") for _, scaled, _ in taken)
    assert all(turned == (form != "dense" and shuffle != "none") for _, _, turned in taken)


def test_the_kernel_is_for_16_bits_and_a_gpu(monkeypatch):
    monkeypatch.setattr(_ffi_norm, "_runs", lambda: True)
    assert norm_takes("float16", 4096)
    assert norm_takes(jnp.bfloat16, 24320)
    assert not norm_takes("float32", 4096)
    assert not norm_takes("float16", 4100)
    assert not norm_takes("float16", 24328)
    monkeypatch.setattr(_ffi_norm, "_runs", lambda: False)
    assert not norm_takes("float16", 4096)


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
        exact, _ = _plain(x, given.get("residual"))
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
