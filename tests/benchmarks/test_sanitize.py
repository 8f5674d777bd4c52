"""What runs under compute-sanitizer, with the plain attention in the kernel's place."""

import importlib
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from esparse_jax.models.attention import cached_attention
from esparse_jax.models.cache import LayerCache
from esparse_jax.models.llama import rotate
from esparse_jax.sparse import Blob24, sparse_matmul


@pytest.fixture(scope="module")
def module():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("sanitize")
    sys.path.remove(folder)


@pytest.fixture
def sanitize(module, monkeypatch):
    """With one small cache, and two of the four numbers of query heads to a key."""
    monkeypatch.setattr(module, "CACHES", ((5, 20),))
    monkeypatch.setattr(module._ffi_attention, "_SHARED", (1, 4))
    return module


def plain(projected, keys, values, cosines, sines, length, start, places, *, heads, prefetch):
    """`attend`, by XLA's products in float32."""
    del prefetch
    rows, slots, features = projected.shape[0], keys.shape[1], keys.shape[2]
    kv_heads = keys.shape[0] // rows
    assert cosines.shape == sines.shape == (1 if start is None else rows, features // 2)
    cut = np.array([heads, heads + kv_heads])
    query, key, value = jnp.split(
        projected.reshape(rows, 1, -1, features).astype(jnp.float32), cut, axis=2
    )
    query, key = (rotate(x, cosines[:, None, None], sines[:, None, None]) for x in (query, key))
    wide = (jnp.nan_to_num(x.astype(jnp.float32)) for x in (keys, values))
    before = LayerCache(*wide, length, start)
    after = before.append(key, value)
    attended = cached_attention(
        query, after.keys, after.values, before.positions(1), before.key_positions()
    )
    place = jnp.minimum(length, slots - 1)
    keys, values = (
        held.at[:, place].set(new[:, place].astype(held.dtype))
        for held, new in ((keys, after.keys), (values, after.values))
    )
    attended = attended.reshape(rows, -1).astype(projected.dtype)
    if places is not None:
        attended = jnp.zeros_like(attended).at[:, places].set(attended)
    return attended, keys, values


def test_norms_are_compared(sanitize, monkeypatch):
    monkeypatch.setattr(sanitize, "NORMS", ((3, 64),))
    assert sanitize.norms() == 16  # on the CPU, where plain JAX takes the kernel's place


@pytest.mark.parametrize("wrong", ["residual", "gain", "permutation", "epsilon"])
def test_mistaken_norms_are_found(sanitize, monkeypatch, wrong):
    norm = sanitize._ffi_norm.add_norm

    def mistaken(x, residual=None, **options):
        options |= {"residual": residual}
        return norm(x, **options | {wrong: 1.0 if wrong == "epsilon" else None})

    monkeypatch.setattr(sanitize, "NORMS", ((3, 64),))
    monkeypatch.setattr(sanitize._ffi_norm, "add_norm", mistaken)
    with pytest.raises(SystemExit, match="a sum is" if wrong == "residual" else "a norm is"):
        sanitize.norms()


def test_attentions_are_compared(sanitize, monkeypatch):
    calls = []

    def attend(projected, keys, *rest, **static):
        calls.append(
            (str(keys.dtype), keys.shape[2], *(x is not None for x in rest[4:6]), *static.values())
        )
        return plain(projected, keys, *rest, **static)

    monkeypatch.setattr(sanitize._ffi_attention, "attend", attend)
    assert sanitize.attentions() == 32
    assert len(set(calls)) == len(calls) == 32
    assert {call[:2] for call in calls} == {
        (dtype, features) for dtype in ("float16", "bfloat16") for features in (64, 128)
    }


def test_the_caches_reach_every_cluster_size(module):
    """As `ClusterOf` in ffi/cuda/attention.cu chooses, for the least and the most, and an H200."""

    def cluster(matrices, multiprocessors):
        blocks = (c for c in (1, 4) if matrices * c * 128 >= 224 * multiprocessors)
        return next(blocks, 8)

    for multiprocessors in (81, 114, 132, 160):
        assert [cluster(rows * module.KV_HEADS, multiprocessors) for rows, _ in module.CACHES] == [
            8,
            4,
            1,
        ]


# What is found, and what is done to the result: attended, keys, values and the token's slot.
MISTAKES = {
    "an attention is": lambda a, k, v, place: (a * 1.01, k, v),
    "an attention is nan": lambda a, k, v, place: (a.at[0, 0].set(jnp.nan), k, v),
    "a key in the cache is": lambda a, k, v, place: (a, k.at[3, place].multiply(1.01), v),
    r"wrong keys in the slots \[2\] of": lambda a, k, v, place: (a, k.at[1, 2, 5].set(9), v),
    r"wrong values in the slots \[17\] of": lambda a, k, v, place: (a, k, v.at[0, place, 0].set(9)),
    r"wrong values in the slots \[18 19\] of": lambda a, k, v, place: (a, k, jnp.nan_to_num(v)),
}


@pytest.mark.parametrize("found", MISTAKES)
def test_mistakes_are_found(sanitize, monkeypatch, found):
    monkeypatch.setattr(sanitize._ffi_attention, "_SHARED", (1,))
    monkeypatch.setattr(sanitize._ffi_attention, "_DTYPES", ("float16",))

    def attend(projected, keys, values, cosines, sines, length, start, places, **static):
        results = plain(projected, keys, values, cosines, sines, length, start, places, **static)
        return MISTAKES[found](*results, jnp.minimum(length, keys.shape[1] - 1))

    monkeypatch.setattr(sanitize._ffi_attention, "attend", attend)
    with pytest.raises(SystemExit, match=found):
        sanitize.attentions()


def test_an_attention_to_padding_is_found(sanitize, monkeypatch):
    monkeypatch.setattr(sanitize._ffi_attention, "_SHARED", (1,))

    def attend(*given, **static):
        start = None if given[6] is None else jnp.zeros_like(given[6])
        return plain(*given[:6], start, *given[7:], **static)

    monkeypatch.setattr(sanitize._ffi_attention, "attend", attend)
    with pytest.raises(SystemExit, match="an attention is"):
        sanitize.attentions()


def test_a_result_in_another_order_is_found(sanitize, monkeypatch):
    monkeypatch.setattr(sanitize._ffi_attention, "_SHARED", (1,))
    monkeypatch.setattr(
        sanitize._ffi_attention,
        "attend",
        lambda *given, **static: plain(*given[:7], None, **static),
    )
    with pytest.raises(SystemExit, match="an attention is"):
        sanitize.attentions()


@pytest.mark.parametrize(
    ("runs", "lines"),
    [
        (True, ["7 attentions compared", "8 prompts compared"]),
        (
            False,
            [
                "attention left out: its kernel needs compute capability 9.0",
                "prefill left out: its kernel is for compute capability 9.0",
            ],
        ),
    ],
)
def test_what_is_printed_inside_satisfies_the_parent(module, monkeypatch, capsys, runs, lines):
    monkeypatch.setattr(module, "products", lambda: 5)
    monkeypatch.setattr(module, "attentions", lambda: 7)
    monkeypatch.setattr(module, "prompts", lambda: 8)
    monkeypatch.setattr(module, "norms", lambda: 9)
    monkeypatch.setattr(module._ffi_attention, "_runs", lambda: runs)
    monkeypatch.setattr(module.ffi, "prefill_runs", lambda capability: runs)
    assert module.main(module.Arguments(inside=True)) == 0
    inside = capsys.readouterr().out
    assert inside.splitlines() == ["5 products compared", *lines, "9 norms compared"]
    summary = "========= ERROR SUMMARY: 0 errors\n"
    assert _parent(module, monkeypatch, inside + summary) == 0
    ran = f"5 products compared, {', '.join(lines)}, 9 norms compared"
    assert capsys.readouterr().out == f"memcheck: 0 errors, {ran}\n"


def _parent(module, monkeypatch, text, returncode=0):
    def run(command, **_):
        return subprocess.CompletedProcess(command, returncode, text, "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return module.main(
        module.Arguments(tools=("memcheck",), compute_sanitizer=Path("compute-sanitizer"))
    )


@pytest.mark.parametrize(
    ("products", "attentions", "prompts", "norms", "summary", "returncode"),
    [
        ("", "7 attentions", "8 prompts", "9 norms", "ERROR SUMMARY: 0 errors", 0),
        ("5 products", "", "8 prompts", "9 norms", "ERROR SUMMARY: 0 errors", 0),
        ("5 products", "0 attentions", "8 prompts", "9 norms", "ERROR SUMMARY: 0 errors", 0),
        ("5 products", "7 attentions", "8 prompts", "", "ERROR SUMMARY: 0 errors", 0),
        ("5 products", "7 attentions", "8 prompts", "0 norms", "ERROR SUMMARY: 0 errors", 0),
        ("5 products", "7 attentions", "8 prompts", "9 norms", "ERROR SUMMARY: 1 error", 0),
        ("5 products", "7 attentions", "", "9 norms", "ERROR SUMMARY: 0 errors", 0),
        ("5 products", "7 attentions", "0 prompts", "9 norms", "ERROR SUMMARY: 0 errors", 0),
        ("5 products", "7 attentions", "8 prompts", "9 norms", "", 0),
        ("5 products", "7 attentions", "8 prompts", "9 norms", "ERROR SUMMARY: 0 errors", 1),
    ],
)
def test_what_did_not_run_is_no_success(
    module, monkeypatch, products, attentions, prompts, norms, summary, returncode
):
    compared = [f"{some} compared" for some in (products, attentions, prompts, norms) if some]
    text = "\n".join((*compared, summary))
    assert _parent(module, monkeypatch, text, returncode) == 1


def test_no_part_is_no_success(module, capsys):
    assert module.main(module.Arguments(parts=())) == 2
    assert "--parts products, attentions, prompts, norms" in capsys.readouterr().err


def test_prompts_are_compared(module, monkeypatch):
    plans = []

    def product(x, data, *, out, plan):
        parted = "split" if plan["split"] > 1 else "tail" if plan.get("tail", 1) > 1 else ""
        plans.append((plan["rows"], plan.get("outputs", 128), plan.get("cluster", 1), parted))
        weight = Blob24(data, (out, x.shape[1]), x.dtype)
        return sparse_matmul(x, weight, backend="reference")

    monkeypatch.setattr(module.ffi, "prefill", product)
    assert module.prompts() == 42
    parted = ((16, 128), (64, 128), (128, 128), (128, 192), (256, 128))
    alone = {(*tile, 1, part) for tile in parted for part in ("", "split", "tail")}
    wide = {(256, 192, 1, part) for part in ("", "split")}
    shared = {(256, outputs, 2, part) for outputs in (128, 192) for part in ("", "tail")}
    assert set(plans) == alone | wide | shared
    monkeypatch.setattr(module.ffi, "prefill", lambda *a, **k: product(*a, **k).at[599, 3].add(9))
    with pytest.raises(SystemExit, match=r"a prompt is .* from float64"):
        module.prompts()
