"""The border to cuSPARSELt, on any machine: a stand-in of the library, on XLA's CPU platform."""

import gc
import re
import subprocess
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_cusparselt
import host_build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_cusparselt import (
    HOST_SONAME,
    NONE_ALIVE,
    REAL_SONAME,
    assert_product,
    random_x,
    run,
    weight24,
)

from esparse_jax import native
from esparse_jax.sparse import Algorithm, SplitKMode, _ffi, _ffi_cusparselt, blob24, compress24

if not _ffi.cpu_product_available():
    pytest.skip("the extension is not built (BUILD.md)", allow_module_level=True)

EXTENSION = native.extension()
HOPPER = (_ffi_cusparselt.reader(800, 90),)
ONE_PRODUCT = {"handle": 1, "matrix": 3, "selection": 1, "plan": 1}
# What needs no question to the library while it is traced.
PLAIN = Algorithm(workspace_bytes=0)


def _product(weight, algorithm=PLAIN, readers=HOPPER):
    """A jitted product with a weight, which is compressed before the stand-in counts."""
    data, out = blob24(compress24(weight)).data, weight.shape[0]

    @jax.jit
    def product(x):
        return _ffi_cusparselt.matmul(x, data, out=out, readers=readers, algorithm=algorithm)

    return product


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 128)])
def test_product_for_any_number_of_rows(fake, shape, dtype):
    weight = weight24(shape, dtype)
    product = _product(weight)
    for rows in (1, 3, 8, 17, 65):
        x = random_x(rows, shape[1], dtype=dtype)
        y = product(x)
        assert (y.shape, y.dtype) == ((rows, shape[0]), x.dtype)
        assert_product(y, x, weight)
        assert fake.last("rows") == -(-rows // 8) * 8
        assert fake.last("stream") == 0


def test_no_rows_call_nothing(fake):
    y = _product(weight24((64, 64), "float16"))(jnp.zeros((0, 64), jnp.float16))
    assert y.shape == (0, 64)
    assert fake.calls("Init") == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (80, 48)])
def test_what_the_library_compresses_it_multiplies(fake, shape, dtype):
    weight = weight24(shape, dtype)
    data = jax.jit(_ffi_cusparselt.compress)(weight)
    if shape != (80, 48):
        np.testing.assert_array_equal(data, blob24(compress24(weight)).data)
    x = random_x(5, shape[1], dtype=dtype)
    y = _ffi_cusparselt.matmul(x, data, out=shape[0], readers=HOPPER)
    assert_product(y, x, weight)


def test_an_executable_has_one_plan_and_takes_it_along(fake):
    product = _product(weight24((64, 128), "float16"))
    x = random_x(8, 128)
    compiled = product.lower(x).compile()
    assert fake.alive() == NONE_ALIVE
    compiled(x).block_until_ready()
    assert fake.alive() == ONE_PRODUCT
    calls = ("Init", "DenseDescriptorInit", "MatmulPlanInit", "MatmulGetWorkspace")
    before = {call: fake.calls(call) for call in calls}
    for _ in range(3):
        compiled(x).block_until_ready()
    assert {call: fake.calls(call) for call in calls} == before
    assert fake.calls("Matmul") == 4
    assert before["MatmulPlanInit"] == 1
    assert fake.alive() == ONE_PRODUCT
    del compiled, product
    jax.clear_caches()
    gc.collect()
    assert fake.alive() == NONE_ALIVE
    assert fake.calls("MatmulPlanDestroy") == 1


def test_loops_and_calls_of_one_product_have_one_plan(fake):
    product, another = (_product(weight24((64, 64), "float16", seed)) for seed in (0, 1))
    x = random_x(8, 64)

    @jax.jit
    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: product(x), x)

    loop(x).block_until_ready()
    assert (fake.calls("Matmul"), fake.calls("MatmulPlanInit")) == (5, 1)

    @jax.jit
    def chain(x):
        return product(another(product(x)))

    chain(x).block_until_ready()
    assert (fake.calls("Matmul"), fake.calls("MatmulPlanInit")) == (8, 1)
    assert fake.alive() == ONE_PRODUCT


@pytest.mark.parametrize(
    "other",
    [
        {"rows": 16},
        {"shape": (128, 64)},
        {"shape": (64, 128)},
        {"dtype": "bfloat16"},
        {"algorithm": Algorithm(id=2, workspace_bytes=0)},
        {"algorithm": Algorithm(id=1, split_k=-1, workspace_bytes=0)},
        {"algorithm": Algorithm(id=1, split_k_mode=SplitKMode.TWO_KERNELS, workspace_bytes=0)},
    ],
    ids=lambda other: "-".join(f"{name}={value}" for name, value in other.items())[:40],
)
def test_other_products_and_algorithms_have_plans_of_their_own(fake, other):
    first = {
        "rows": 8,
        "shape": (64, 64),
        "dtype": "float16",
        "algorithm": Algorithm(id=1, workspace_bytes=0),
    }
    held = []
    for each in (first, first | other, first):
        weight = weight24(each["shape"], each["dtype"])
        product = _product(weight, each["algorithm"])
        x = random_x(each["rows"], each["shape"][1], dtype=each["dtype"])
        assert_product(product(x), x, weight)
        held.append(product)
    assert fake.calls("MatmulPlanInit") == fake.alive()["plan"] == 2
    assert fake.calls("Init") == fake.alive()["handle"] == 1  # which all plans share


def test_split_k_buffers_tell_plans_apart(fake):
    fake.set("architecture", 80)
    held = []
    for buffers in (1, 2, 1):
        algorithm = Algorithm(id=1, split_k=4, split_k_buffers=buffers, workspace_bytes=8192)
        product = _product(
            weight24((64, 64), "float16"), algorithm, (_ffi_cusparselt.reader(800, 80),)
        )
        product(random_x(8, 64)).block_until_ready()
        assert fake.last("split_k_buffers") == buffers
        held.append(product)
    assert fake.calls("MatmulPlanInit") == fake.alive()["plan"] == 2


def test_executables_share_a_plan_which_goes_with_the_last(fake):
    weights = [weight24((64, 128), "float16", seed) for seed in (0, 1)]
    x = random_x(8, 128)
    first, second = (_product(weight).lower(x).compile() for weight in weights)
    assert_product(first(x), x, weights[0])
    assert_product(second(x), x, weights[1])
    assert fake.calls("MatmulPlanInit") == 1
    assert fake.alive() == ONE_PRODUCT
    del first
    gc.collect()
    assert fake.alive() == ONE_PRODUCT
    assert_product(second(x), x, weights[1])
    del second
    gc.collect()
    assert fake.alive() == NONE_ALIVE
    third = _product(weights[0]).lower(x).compile()  # what is gone is made anew
    assert_product(third(x), x, weights[0])
    assert fake.calls("MatmulPlanInit") == 2
    assert fake.alive() == ONE_PRODUCT


def test_a_question_takes_the_plan_that_is_there(fake):
    fake.set("workspace", 77)
    question = {"rows": 8, "out": 64, "channels": 128, "dtype": np.dtype("float16")}
    assert _ffi_cusparselt.describe_plan(**question).workspace_bytes == 77
    assert fake.alive() == NONE_ALIVE  # on the host a question leaves nothing behind
    product = _product(weight24((64, 128), "float16"), Algorithm(workspace_bytes=77))
    product(random_x(8, 128)).block_until_ready()
    assert fake.calls("MatmulPlanInit") == 2
    facts = _ffi_cusparselt.describe_plan(**question)
    assert (facts.workspace_bytes, facts.chosen.id) == (77, 2)
    assert fake.calls("MatmulPlanInit") == 2
    assert fake.alive() == ONE_PRODUCT


def test_a_plan_that_failed_is_not_kept_for_others(fake):
    weight, x = weight24((64, 64), "float16"), random_x(8, 64)
    first, second = (_product(weight).lower(x).compile() for _ in range(2))
    fake.fail("MatmulPlanInit")
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="cusparseLtMatmulPlanInit"):
            first(x).block_until_ready()
        assert fake.alive() == NONE_ALIVE
    assert fake.calls("MatmulPlanInit") == 2
    fake.fail("")
    assert_product(second(x), x, weight)
    assert_product(first(x), x, weight)
    assert fake.calls("MatmulPlanInit") == 3
    assert fake.alive() == ONE_PRODUCT


def test_the_workspace_is_asked_for_once_per_product(fake):
    fake.set("workspace", 1000)
    product = _product(weight24((64, 64), "float16"), algorithm=None)
    x = random_x(8, 64)
    assert "tensor<1000xui8>" in product.lower(x).as_text()
    assert_product(product(x), x, weight24((64, 64), "float16"))
    assert fake.calls("MatmulPlanInit") == 2  # to ask, and to run


def test_too_small_a_workspace_is_refused(fake):
    fake.set("workspace", 1000)
    product = _product(weight24((64, 64), "float16"), Algorithm(workspace_bytes=999))
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"y\[8, 64\].* needs a workspace of 1000 bytes.*got U8\[999\].*workspace_bytes",
    ):
        product(random_x(8, 64)).block_until_ready()


def test_the_algorithm_reaches_the_library(fake):
    weight = weight24((64, 128), "bfloat16")
    x = random_x(16, 128, dtype="bfloat16")
    fake.set("architecture", 80)
    algorithm = Algorithm(id=5, split_k=4, split_k_mode=SplitKMode.TWO_KERNELS, split_k_buffers=2)
    readers = (*HOPPER, _ffi_cusparselt.reader(800, 80))
    product = _product(weight, algorithm, readers)
    assert f"tensor<{4 * 3 * 16 * 64}xui8>" in product.lower(x).as_text()
    assert_product(product(x), x, weight)
    names = ("algorithm", "split_k", "split_k_mode", "split_k_buffers")
    assert [fake.last(name) for name in names] == [5, 4, 2, 2]


def test_segment_k_on_hopper(fake):
    weight, x = weight24((64, 64), "float16"), random_x(8, 64)
    assert_product(_product(weight, Algorithm(id=0, split_k=-1))(x), x, weight)
    assert (fake.last("algorithm"), fake.last("split_k")) == (0, -1)


def test_without_an_algorithm_the_library_chooses(fake):
    fake.set("default_algorithm", 6)
    _product(weight24((64, 64), "float16"))(random_x(8, 64)).block_until_ready()
    assert fake.last("algorithm") == 6
    assert fake.calls("MatmulAlgSetAttribute") == 0


def test_an_unknown_algorithm_is_refused(fake):
    product = _product(weight24((64, 64), "float16"), Algorithm(id=8, workspace_bytes=0))
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"cuSPARSELt 0\.8\.0 has the algorithms 0 to 7 .*search again.*with algorithm 8",
    ):
        product(random_x(8, 64)).block_until_ready()


def test_what_the_architecture_does_not_offer_is_refused_by_name(fake):
    product = _product(weight24((64, 64), "float16"), Algorithm(split_k=2, workspace_bytes=0))
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"cusparseLtMatmulAlgSetAttribute of cuSPARSELt 0\.8\.0 failed: operation not supp"
        r"orted \(CUSPARSE_STATUS_NOT_SUPPORTED\)\. The product is y\[8, 64\] = x\[8, 64\] \* "
        r"W\[64, 64\]\^T in float16, with the library's own algorithm, split_k 2",
    ):
        product(random_x(8, 64)).block_until_ready()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": -1}, "id .* a number from 0, or None.*got -1"),
        ({"split_k": 0}, r"split_k .* -1 \(segment-K\) or from 1.*got 0"),
        ({"split_k_mode": 7}, "split_k_mode .* SplitKMode.*got 7"),
        ({"split_k_buffers": 0}, "split_k_buffers .* from 1.*got 0"),
        ({"workspace_bytes": -1}, "workspace_bytes .*got -1"),
    ],
)
def test_algorithms_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Algorithm(**fields)


@pytest.mark.parametrize(
    ("call", "skip"),
    [
        ("Init", 0),
        ("StructuredDescriptorInit", 0),
        ("DenseDescriptorInit", 0),
        ("DenseDescriptorInit", 1),
        ("MatmulDescriptorInit", 0),
        ("MatmulAlgSelectionInit", 0),
        ("MatmulAlgGetAttribute", 0),
        ("MatmulAlgSetAttribute", 0),
        ("MatmulPlanInit", 0),
        ("MatmulGetWorkspace", 0),
        ("SpMMACompressedSize2", 0),
        ("Matmul", 0),
    ],
)
def test_a_failing_call_is_named_leaks_nothing_and_may_be_tried_again(fake, call, skip):
    weight = weight24((64, 64), "float16")
    product, x = _product(weight, Algorithm(id=1, workspace_bytes=0)), random_x(8, 64)
    fake.fail(call, skip=skip)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=rf"cusparseLt{call} of cuSPARSELt 0\.8\.0 failed: opera"
    ):
        product(x).block_until_ready()
    assert fake.alive() == (ONE_PRODUCT if call == "Matmul" else NONE_ALIVE)
    fake.fail("")
    assert_product(product(x), x, weight)
    assert fake.alive() == ONE_PRODUCT


@pytest.mark.parametrize(
    "call", ["Init", "StructuredDescriptorInit", "SpMMACompressedSize2", "SpMMACompress2"]
)
def test_a_failing_compression_is_named_and_leaks_nothing(fake, call):
    weight = weight24((64, 64), "float16")
    compiled = jax.jit(_ffi_cusparselt.compress).lower(weight).compile()
    fake.fail(call)
    message = rf"cusparseLt{call} of cuSPARSELt 0\.8\.0 failed"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        compiled(weight).block_until_ready()
    assert fake.alive()["matrix"] == (1 if call == "SpMMACompress2" else 0)
    fake.fail("")
    np.testing.assert_array_equal(compiled(weight), blob24(compress24(weight)).data)


def test_sizes_that_need_a_gpu_say_what_failed(fake):
    fake.fail("Init", status=1)
    with pytest.raises(RuntimeError, match=r"cusparseLtInit .*NOT_INITIALIZED"):
        _ffi_cusparselt.compress(weight24((64, 64), "float16"))
    with pytest.raises(RuntimeError, match=r"cusparseLtInit .*NOT_INITIALIZED"):
        _ffi_cusparselt.describe_plan(rows=9, out=64, channels=64, dtype=np.dtype("float16"))


def test_a_plan_is_described(fake):
    fake.set("workspace", 77)
    facts = _ffi_cusparselt.describe_plan(
        rows=9, out=64, channels=128, dtype=np.dtype("float16"), algorithm=Algorithm(id=3)
    )
    assert facts.algorithms == 8
    assert (facts.blob_bytes, facts.workspace_bytes) == (64 * 128 * 9 // 8, 77)
    assert facts.chosen == Algorithm(
        id=3, split_k=1, split_k_mode=SplitKMode.ONE_KERNEL, workspace_bytes=77
    )
    fake.fail("MatmulAlgGetAttribute", skip=1)  # after the number of algorithms
    facts = _ffi_cusparselt.describe_plan(rows=9, out=64, channels=128, dtype=np.dtype("float16"))
    assert facts.chosen == Algorithm(workspace_bytes=77)
    with pytest.raises(ValueError, match="float16 and bfloat16; got float32"):
        _ffi_cusparselt.describe_plan(rows=8, out=64, channels=64, dtype=np.dtype("float32"))


@pytest.mark.parametrize(("version", "architecture"), [(800, 80), (801, 90)])
def test_a_blob_is_read_by_its_own_library_alone(fake, version, architecture):
    readers = (_ffi_cusparselt.reader(version, architecture),)
    product = _product(weight24((64, 64), "float16"), readers=readers)
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=rf"FAILED_PRECONDITION.*in version 0\.8\.{version % 100} on sm_{architecture}; here "
        r"it is 0\.8\.0 on sm_90, whose layout may be another.*device_blob24",
    ):
        product(random_x(8, 64)).block_until_ready()
    assert fake.calls("Init") == 0


def test_threads_make_one_plan_and_take_turns_with_it(fake):
    weight, x = weight24((192, 192), "float16"), random_x(64, 192)
    compiled = _product(weight).lower(x).compile()
    with ThreadPoolExecutor(8) as threads:
        results = [threads.submit(compiled, x) for _ in range(32)]
        first = np.asarray(results[0].result())
        assert_product(results[0].result(), x, weight)
        for y in results:
            np.testing.assert_array_equal(np.asarray(y.result()), first)
    assert fake.calls("Matmul") == 32
    assert fake.calls("MatmulPlanInit") == 1
    assert fake.alive() == ONE_PRODUCT


def _together(calls: list) -> list:
    """What the calls return or raise, each from a thread of its own, all started at once."""
    barrier = threading.Barrier(len(calls))

    def one(call):
        barrier.wait(timeout=60)
        try:
            return call()
        except jax.errors.JaxRuntimeError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(one, calls))


def test_threads_with_executables_of_their_own_make_one_plan(fake):
    fake.slow("MatmulPlanInit", milliseconds=50)  # the others come while one makes it
    weights = [weight24((192, 192), "float16", seed) for seed in range(6)]
    x = random_x(64, 192)
    compiled = [_product(weight).lower(x).compile() for weight in weights]
    for _ in range(3):
        results = _together([lambda each=each: np.asarray(each(x)) for each in compiled])
        for y, weight in zip(results, weights, strict=True):
            assert_product(y, x, weight)
    assert fake.calls("MatmulPlanInit") == 1
    assert fake.alive() == ONE_PRODUCT


def test_threads_do_not_share_the_failure_of_one(fake):
    fake.slow("MatmulPlanInit", milliseconds=20)
    weight, x = weight24((64, 64), "float16"), random_x(8, 64)
    compiled = [_product(weight).lower(x).compile() for _ in range(4)]
    fake.fail("MatmulPlanInit")
    results = _together([lambda each=each: np.asarray(each(x)) for each in compiled])
    assert all("cusparseLtMatmulPlanInit" in str(error) for error in results)
    assert fake.calls("MatmulPlanInit") == 4
    assert fake.alive() == NONE_ALIVE
    fake.fail("")
    for y in _together([lambda each=each: np.asarray(each(x)) for each in compiled]):
        assert_product(y, x, weight)
    assert fake.calls("MatmulPlanInit") == 5


def _make_and_destroy_a_plan(algorithm: int):
    """Nothing but the question holds the plan."""
    return _ffi_cusparselt.describe_plan(
        rows=8, out=64, channels=64, dtype=np.dtype("float16"), algorithm=Algorithm(id=algorithm)
    )


def _make_and_destroy_a_compression():
    return EXTENSION.cusparselt_compressed_bytes(out=64, channels=64, dtype="float16", on_host=True)


DESTROYING = ("MatmulPlanDestroy", "MatmulAlgSelectionDestroy", "MatDescriptorDestroy")


def test_threads_destroy_and_use_what_shares_a_handle_in_turns(fake):
    weight, x = weight24((64, 64), "float16"), random_x(8, 64)
    product = _product(weight).lower(x).compile()
    assert_product(product(x), x, weight)  # holds the context from here on
    fake.slow(*DESTROYING, "MatmulPlanInit", "Matmul", milliseconds=2)
    before = fake.overlaps()
    calls = [lambda i=i: _make_and_destroy_a_plan(i) for i in range(4)]
    calls += [_make_and_destroy_a_compression, lambda: np.asarray(product(x))] * 3
    for _ in range(5):
        assert not [each for each in _together(calls) if isinstance(each, Exception)]
    assert fake.calls("MatmulPlanDestroy") == 20
    assert fake.calls("MatDescriptorDestroy") == 20 * 3 + 15
    assert fake.calls("Init") == 1
    assert fake.overlaps() == before


def test_devices_make_their_contexts_at_the_same_time_and_one_each(fake):
    fake.slow("Init", milliseconds=200)

    def on(device):
        fake.use_device(device)
        _make_and_destroy_a_plan(device)

    assert _together([lambda i=i: on(i) for i in range(4)]) == [None] * 4
    assert fake.calls("Init") == 4
    assert fake.at_once("Init") > 1
    fake.reset()
    fake.slow("Init", milliseconds=50)
    weights = [weight24((64, 64), "float16", seed) for seed in range(4)]
    x = random_x(8, 64)
    compiled = [_product(weight).lower(x).compile() for weight in weights]
    _together([lambda each=each: np.asarray(each(x)) for each in compiled])
    assert fake.calls("Init") == 1


@pytest.mark.parametrize("call", ["MatmulAlgGetAttribute", "MatmulPlanInit", "MatmulGetWorkspace"])
def test_threads_destroy_half_made_plans_in_turns(fake, call):
    weight, x = weight24((64, 64), "float16"), random_x(8, 64)
    product = _product(weight).lower(x).compile()
    product(x).block_until_ready()
    alive, before = fake.alive(), fake.overlaps()
    fake.slow(*DESTROYING, milliseconds=2)
    fake.fail(call)

    def fails(algorithm):
        with pytest.raises(RuntimeError, match=f"cusparseLt{call} .* algorithm {algorithm}, split"):
            _make_and_destroy_a_plan(algorithm)

    for _ in range(3):
        _together([lambda i=i: fails(i) for i in range(6)])
    assert fake.alive() == alive
    assert fake.overlaps() == before


F16, U8, F32 = jnp.float16, jnp.uint8, jnp.float32
BLOB = ((64 * 64 * 9 // 8,), U8)


def _matmul_call(x, blob, y, workspace, **attributes):
    attributes = {
        "algorithm": -1,
        "split_k": 0,
        "split_k_mode": 0,
        "split_k_buffers": 0,
        **attributes,
    }
    results = [jax.ShapeDtypeStruct(*y), jax.ShapeDtypeStruct(*workspace)]
    call = jax.ffi.ffi_call(EXTENSION.CUSPARSELT_MATMUL_HOST, results)
    arrays = [jnp.zeros(*each) for each in (x, blob)]
    attributes = {name: np.int32(value) for name, value in attributes.items()}
    jax.block_until_ready(call(*arrays, readers=np.array(HOPPER, np.int32), **attributes))


@pytest.mark.parametrize(
    ("x", "blob", "y", "workspace", "message"),
    [
        (((8,), F16), BLOB, ((8, 64), F16), ((0,), U8), r"matrices.*got x F16\[8\]"),
        (((8, 64), F16), BLOB, ((8, 64, 1), F16), ((0,), U8), r"got y F16\[8, 64, 1\]"),
        (((8, 64), F32), BLOB, ((8, 64), F32), ((0,), U8), r"F16 and BF16; got x F32\[8, 64\]"),
        (((8, 64), F16), BLOB, ((8, 64), F32), ((0,), U8), r"rows and the dtype of x; .*F32\[8,"),
        (((8, 64), F16), BLOB, ((16, 64), F16), ((0,), U8), r"rows and .*y F16\[16, 64\]"),
        (((8, 64), F16), ((9, 8), U8), ((8, 64), F16), ((0,), U8), r"blob must be U8\[bytes\]; g"),
        (
            ((8, 64), F16),
            ((4607,), U8),
            ((8, 64), F16),
            ((0,), U8),
            r"64 outputs and 64 channels is a blob U8\[4608\] .*got U8\[4607\]",
        ),
        (((8, 64), F16), BLOB, ((8, 64), F16), ((0,), F32), r"workspace must be U8.*F32\[0\]"),
        (((8, 72), F16), BLOB, ((8, 64), F16), ((0,), U8), r"StructuredDescriptorInit .*NOT_SUPP"),
        (((9, 64), F16), BLOB, ((9, 64), F16), ((0,), U8), r"DenseDescriptorInit .*NOT_SUPPORTED"),
    ],
)
def test_the_handler_says_what_was_given(fake, x, blob, y, workspace, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        _matmul_call(x, blob, y, workspace)


@pytest.mark.parametrize(
    "attributes",
    [
        {"algorithm": -2},
        {"split_k": -2},
        {"split_k_mode": 7},
        {"split_k_mode": -1},
        {"split_k_buffers": -1},
    ],
)
def test_the_handler_checks_its_attributes_before_it_runs(fake, attributes):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"or -1 for the library's own choice"):
        _matmul_call(((8, 64), F16), BLOB, ((8, 64), F16), ((0,), U8), **attributes)


@pytest.mark.parametrize(
    ("weight", "blob", "workspace", "message"),
    [
        (((64,), F16), BLOB, ((48,), U8), r"matrices.*weight F16\[64\]"),
        (((64, 64), F32), BLOB, ((48,), U8), r"got weight F32\[64, 64\]"),
        (((64, 64), F16), ((4600,), U8), ((48,), U8), r"F16\[64, 64\] to 4608 bytes .*U8\[4600\]"),
        (((64, 64), F16), ((4608,), F16), ((48,), U8), r"blob must be U8\[bytes\]"),
        (((64, 64), F16), BLOB, ((47,), U8), r"compression of F16\[64, 64\] needs .* 48 bytes"),
    ],
)
def test_the_compression_says_what_was_given(fake, weight, blob, workspace, message):
    results = [jax.ShapeDtypeStruct(*blob), jax.ShapeDtypeStruct(*workspace)]
    call = jax.ffi.ffi_call(EXTENSION.CUSPARSELT_COMPRESS_HOST, results)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(jnp.zeros(*weight)))


def test_timing_says_what_it_needs(fake, monkeypatch):
    with pytest.raises(ValueError, match="a multiple of 8 rows; got 9"):
        _search(rows=9)
    search, blobs = _search(), jnp.zeros((2, 4608), jnp.uint8)
    search.take(None)
    monkeypatch.setattr(EXTENSION, "HAS_CUSPARSELT_TIMER", False)
    with pytest.raises(RuntimeError, match="ESPARSE_CUDA=ON"):
        search.time(random_x(8, 64), blobs)
    monkeypatch.setattr(EXTENSION, "HAS_CUSPARSELT_TIMER", True)
    with pytest.raises(ValueError, match=r"for x of float16\[8, 64\]; got float16\[16, 64\]"):
        search.time(random_x(16, 64), blobs)
    with pytest.raises(
        ValueError, match=r"y must be float16\[8 or more, 64\]; got float16\[7, 64\]"
    ):
        search.time(random_x(8, 64), blobs, y=random_x(7, 64))
    with pytest.raises(ValueError, match="has 4608 bytes; got blobs of 4607"):
        search.time(random_x(8, 64), blobs[:, 1:])
    search._gpu = "another GPU"
    with pytest.raises(ValueError, match=r"is for another GPU; x is on .*cpu.*\. Put it there"):
        search.time(random_x(8, 64), blobs, y=random_x(8, 64))


def _search(rows=8, channels=64):
    return _ffi_cusparselt.AlgorithmSearch(
        rows=rows, out=64, channels=channels, dtype=np.dtype("float16")
    )


def _taken(search, **algorithm) -> tuple[int, int | None, int]:
    facts = search.take(Algorithm(**algorithm))
    return facts.chosen.id, facts.chosen.split_k, facts.workspace_bytes


def test_a_search_describes_its_product_once(fake):
    fake.set("default_algorithm", 6)
    search = _search()
    assert _taken(search) == (6, 1, 0)
    segments = _taken(search, id=3, split_k=-1)
    assert segments[:2] == (3, -1)
    assert _taken(search, id=4) == (4, 1, 0)  # not split, as if it were the first
    assert _taken(search, id=3, split_k=-1) == segments
    assert _taken(search) == (6, 1, 0)
    assert (fake.calls("MatmulAlgSelectionInit"), fake.calls("MatmulPlanInit")) == (1, 5)
    assert fake.calls("MatmulPlanDestroy") == 0  # it would take the selection along
    del search
    gc.collect()
    assert fake.alive() == NONE_ALIVE


@pytest.mark.parametrize("refused", [{"id": 8}, {"id": 1, "split_k": 2}])
def test_a_search_goes_on_after_a_refused_algorithm(fake, refused):
    search = _search()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="The product is"):
            search.take(Algorithm(**refused))
        assert _taken(search, id=2) == (2, 1, 0)
    assert fake.calls("MatmulAlgSelectionInit") == 2  # the first failure left nothing to keep


def test_what_cannot_be_set_back_is_described_anew(fake):
    fake.set("architecture", 80)  # where the number of buffers may not be 0
    search = _search(channels=128)
    buffers = {"split_k": 4, "split_k_mode": SplitKMode.TWO_KERNELS, "split_k_buffers": 2}
    assert _taken(search, id=5, **buffers)[:2] == (5, 4)
    assert fake.calls("MatmulAlgSelectionInit") == 1
    assert _taken(search, id=5) == (5, 1, 0)
    assert fake.calls("MatmulAlgSelectionInit") == 2
    assert fake.alive() == ONE_PRODUCT


def test_a_search_that_failed_can_take_another(fake, monkeypatch):
    search = _search()
    fake.fail("MatmulAlgSelectionInit")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cusparseLtMatmulAlgSelectionInit"):
            search.take(None)
    fake.fail("")
    assert _taken(search) == (2, 1, 0)
    fake.fail("MatmulPlanInit")
    with pytest.raises(RuntimeError, match="cusparseLtMatmulPlanInit"):
        search.take(None)
    monkeypatch.setattr(EXTENSION, "HAS_CUSPARSELT_TIMER", True)
    with pytest.raises(RuntimeError, match="take one first"):
        search.time(random_x(8, 64), jnp.zeros((1, 4608), jnp.uint8), launches=1)


def test_what_the_library_does_not_tell_is_described_anew(fake):
    search = _search()
    fake.fail("MatmulAlgGetAttribute", skip=1)  # how many there are it does tell
    assert search.take(Algorithm(id=3, split_k=-1)).chosen.id is None
    fake.fail("")
    assert _taken(search, id=4) == (4, 1, 0)
    assert fake.calls("MatmulAlgSelectionInit") == 2


def test_all_stages_are_registered_for_cuda():
    registrations = EXTENSION.registrations()
    for target in (EXTENSION.CUSPARSELT_MATMUL, EXTENSION.CUSPARSELT_COMPRESS):
        platform, stages = registrations[target]
        assert platform == "CUDA"
        assert set(stages) == {"instantiate", "initialize", "execute"}
    names = list(EXTENSION.types()) + list(EXTENSION.host_types())
    assert len(set(names)) == len(names) == 4


# ---- in processes of their own


LOAD = """
    from esparse_jax.sparse import _ffi_cusparselt, load_cusparselt
    print(load_cusparselt(), _ffi_cusparselt.opened_library().path)
"""


@pytest.mark.parametrize("folder", ["cusparselt/lib", "cu12/lib", "cu13/lib"])
def test_the_library_is_found_in_its_wheel(tmp_path, folder):
    file = fake_cusparselt.build(tmp_path / "nvidia" / folder, REAL_SONAME)
    assert run(LOAD, first=tmp_path) == f"0.8.0 {file}"


def test_the_later_layout_comes_first(tmp_path):
    fake_cusparselt.build(tmp_path / "nvidia/cusparselt/lib", REAL_SONAME, "FAKE_VERSION=701")
    file = fake_cusparselt.build(tmp_path / "nvidia/cu13/lib", REAL_SONAME, "FAKE_VERSION=1000")
    assert run(LOAD, first=tmp_path) == f"0.10.0 {file}"


def test_all_that_was_tried_is_reported_once(tmp_path):
    old = fake_cusparselt.build(tmp_path / "nvidia/cusparselt/lib", REAL_SONAME, "FAKE_VERSION=701")
    broken = tmp_path / "nvidia/cu12/lib" / REAL_SONAME
    broken.parent.mkdir(parents=True)
    broken.write_text("no library")
    program = """
        from esparse_jax.sparse import _ffi_cusparselt
        print(_ffi_cusparselt.available())
    """
    reason = run(program, first=tmp_path)
    assert reason.count(str(broken)) == reason.count(f"{old} is cuSPARSELt 0.7.1") == 1


def test_what_is_loaded_already_is_used(tmp_path):
    wheel = fake_cusparselt.build(tmp_path / "nvidia/cu13/lib", REAL_SONAME)
    other = fake_cusparselt.build(tmp_path / "other", REAL_SONAME, "FAKE_VERSION=901")
    program = f"import ctypes\nctypes.CDLL({str(other)!r})\n" + textwrap.dedent(LOAD)
    assert wheel.is_file()
    assert run(program, first=tmp_path) == f"0.9.1 {other}"


@pytest.mark.parametrize(
    ("soname", "define", "expected"),
    [
        (
            REAL_SONAME,
            "FAKE_VERSION=701",
            r"0\.7\.1; 0\.8\.0 up to, not including, 1\.0\.0 can be c",
        ),
        (
            REAL_SONAME,
            "FAKE_VERSION=1000000",
            r"is cuSPARSELt 1\.0\.0; 0\.8\.0 up to, not including",
        ),
        (
            REAL_SONAME,
            "FAKE_WITHOUT_COMPRESS",
            r"\(cuSPARSELt 0\.8\.0\) has no function cusparseLtSpMMACompress2\.",
        ),
        ("libother.so", "FAKE_VERSION=800", r"library, but not libcusparseLt\.so\.0\."),
        ("no library", None, "could not be opened: .*/no library: "),
        ("nothing", None, "could not be opened: .*/nothing: cannot open shared object file"),
    ],
)
def test_what_cannot_be_opened_says_why(tmp_path, soname, define, expected):
    file = tmp_path / soname
    if define is not None:
        fake_cusparselt.build(tmp_path, soname, define)
    elif soname == "no library":
        file.write_text("text")
    program = """
        import sys
        from importlib.util import module_from_spec, spec_from_file_location
        spec = spec_from_file_location("_esparse_ffi", sys.argv[1])
        extension = module_from_spec(spec)  # alone: importing the package would take seconds
        spec.loader.exec_module(extension)
        try:
            print(extension.cusparselt_open(sys.argv[2]))
        except RuntimeError as error:
            print(error)
    """
    message = run(program, EXTENSION.__file__, str(file))
    assert str(file) in message
    assert re.search(expected, message)


DRIVER = """
extern "C" {
int status = 0, current = 0;
int cuCtxGetDevice(int* device) { *device = current; return status; }
int cuDeviceGetAttribute(int*, int, int) { return status; }
}
"""


def test_where_no_gpu_is_current_it_is_the_first(tmp_path):
    """With stand-ins of the driver and of the library; each GPU asked for has a context."""
    library = fake_cusparselt.build(tmp_path, REAL_SONAME)
    driver, source = tmp_path / "libcuda.so.1", tmp_path / "driver.cc"
    source.write_text(DRIVER)
    command = [host_build.compiler(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(source), "-o", str(driver)], check=True, timeout=300)
    program = """
        import ctypes, sys
        from importlib.util import module_from_spec, spec_from_file_location
        library, driver = ctypes.CDLL(sys.argv[2]), ctypes.CDLL(sys.argv[3])
        spec = spec_from_file_location("_esparse_ffi", sys.argv[1])
        extension = module_from_spec(spec)  # alone: JAX could load the machine's own driver
        spec.loader.exec_module(extension)
        extension.cusparselt_open(sys.argv[2])
        def contexts(status, current):
            ctypes.c_int.in_dll(driver, "status").value = status
            ctypes.c_int.in_dll(driver, "current").value = current
            extension.cusparselt_compressed_bytes(
                out=64, channels=64, dtype="float16", on_host=False
            )
            return library.esparse_fake_calls(b"Init")
        not_initialized, invalid_context, no_device = 3, 201, 100
        print(contexts(0, 0), contexts(not_initialized, 5), contexts(invalid_context, 5))
        print(contexts(0, 5))
        try:
            contexts(no_device, 5)
        except RuntimeError as error:
            print(error)
    """
    error = "the CUDA driver does not tell which GPU is current: error 100."
    printed = run(program, EXTENSION.__file__, str(library), str(driver))
    assert printed.splitlines() == ["1 1 1", "2", error]


def test_without_the_library_the_way_to_get_it_is_named(monkeypatch):
    reason = "cuSPARSELt could not be opened: it is not there."
    monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: reason)
    assert _ffi_cusparselt.available() == reason
    assert _ffi_cusparselt.opened_library() is None
    for call in (
        _ffi_cusparselt.load_cusparselt,
        lambda: _ffi_cusparselt.compress(weight24((64, 64), "float16")),
    ):
        with pytest.raises(RuntimeError, match=r"not there\. .*pip install nvidia-cusparselt-cu13"):
            call()


def test_without_the_extension_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(native, "extension", lambda: None)
    assert "the compiled extension is missing" in _ffi_cusparselt._find.__wrapped__()


def test_a_computation_without_its_library_says_what_to_call():
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from pathlib import Path
        from esparse_jax import native
        extension = native.extension()
        jax.devices("cpu")
        for name, (platform, registration) in extension.host_types().items():
            jax.ffi.register_ffi_type(name, registration, platform=platform)
        for name, (platform, stages) in extension.host_registrations().items():
            jax.ffi.register_ffi_target(name, stages, platform=platform)
        shapes = [jax.ShapeDtypeStruct((4608,), jnp.uint8), jax.ShapeDtypeStruct((48,), jnp.uint8)]
        try:
            jax.ffi.ffi_call(extension.CUSPARSELT_COMPRESS_HOST, shapes)(jnp.zeros((64, 64)))
        except jax.errors.JaxRuntimeError as error:
            print(error)
    """
    message = rf"{HOST_SONAME} is not loaded in this process\. Call .*load_cusparselt\(\) first"
    assert re.search(message, run(program))


def test_devices_compute_each_its_part_and_loops_carry_what_varies(stand_in):
    """On two CPU devices, which a process must ask for before it has any.

    To the library they are one, the host, with one context and plan.
    """
    program = """
        import gc, sys
        from pathlib import Path
        import jax, jax.numpy as jnp, numpy as np, pytest
        from jax.sharding import PartitionSpec as P
        import fake_cusparselt as stand_in
        from esparse_jax.sparse import Algorithm, _ffi_cusparselt, blob24, compress24

        assert jax.device_count() == 2
        mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        weights = [stand_in.weight24((64, 64), "float16", seed) for seed in (0, 1)]
        data = jnp.stack([blob24(compress24(weight)).data for weight in weights])
        x = stand_in.random_x(6, 64)

        def product(x, data):
            return _ffi_cusparselt.matmul(
                x, data[0], out=64, readers=(800090,), algorithm=Algorithm(workspace_bytes=0)
            )

        def scanned(x, data):
            def step(carry, _):
                return carry + product(x, data), None
            return jax.lax.scan(step, jnp.zeros_like(product(x, data)), None, length=2)[0]

        def repeated(x, data):
            start = jnp.zeros_like(product(x, data))
            return jax.lax.while_loop(
                lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + product(x, data)), (0, start)
            )[1]

        with pytest.MonkeyPatch.context() as patch:
            with stand_in.used_on_host(Path(sys.argv[1]), patch) as fake:
                for function, times in ((product, 1), (scanned, 2), (repeated, 2)):
                    sharded = jax.shard_map(
                        function, mesh=mesh, in_specs=(P(), P("model")), out_specs=P(None, "model")
                    )
                    y = np.asarray(jax.jit(sharded)(x, data), np.float32)
                    want = np.concatenate([np.asarray(x @ w.T, np.float32) for w in weights], 1)
                    np.testing.assert_allclose(y, times * want, rtol=2e-2, atol=2e-2)
                    if function is product:
                        assert fake.alive()["handle"] == fake.alive()["plan"] == 1
                        assert fake.calls("Matmul") == 2
                        del y
            assert set(fake.alive().values()) == {0}
        print("passed")
    """
    flags = "--xla_force_host_platform_device_count=2"
    assert run(program, str(stand_in), XLA_FLAGS=flags) == "passed"


# ---- against NVIDIA's own header


def test_the_declarations_are_those_of_the_header(tmp_path):
    """Where the library's wheel and a CUDA toolkit are installed; neither is needed to build."""
    headers = [file.parents[1] / "include" for file in _ffi_cusparselt._wheel_files()]
    headers = [folder for folder in headers if (folder / "cusparseLt.h").is_file()]
    if not headers:
        pytest.skip("the wheel of cuSPARSELt, which brings its header, is not installed")
    source = host_build.FFI / "cusparselt" / "testing" / "abi_check.cc"
    found = [Path("/usr/local/cuda/include"), *headers[0].parents[0].glob("**/include")]
    found += [folder.parents[1] / "cuda_runtime" / "include" for folder in headers]
    toolkit = [folder for folder in found if (folder / "driver_types.h").is_file()]
    if not toolkit:
        pytest.skip("the header of cuSPARSELt includes those of the CUDA toolkit: there is none")
    includes = [f"-I{folder}" for folder in (host_build.FFI, headers[0], *toolkit)]
    command = [host_build.compiler(), "-std=c++17", "-fsyntax-only", *includes, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "cusparse.h: No such file" in done.stderr:
        pytest.skip("up to 0.9.1 the header includes cusparse.h, which is not installed")
    assert done.returncode == 0, done.stderr
