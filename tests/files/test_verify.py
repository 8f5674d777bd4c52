import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_checkpoint, tiny_weights, write_weights

from esparse_jax.files import (
    compress_checkpoint,
    load_model,
    save_model,
    verify_checkpoint,
    write_json,
)
from esparse_jax.models.surgery import get_linear, iter_linears, replace_linears, with_weight
from esparse_jax.pruning import NMPattern

DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"
TWO_OF_FOUR = NMPattern(2, 4)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """2:4 in a random order of the channels, layer by layer, and those orders."""
    directory = tmp_path_factory.mktemp("verify")
    source = tiny_checkpoint(directory / "source", tokenizer=False, shards=2, dtype="bfloat16")
    model, _ = load_model(source)
    generator = np.random.default_rng(0)
    orders, linears = {}, {}
    for path, linear in iter_linears(model):
        if path == "lm_head":
            continue
        kernel = np.array(linear.kernel.get_value())
        order = generator.permutation(len(kernel)).astype(np.int32)
        kernel[order[np.arange(len(kernel)) % 4 >= 2]] = 0
        linears[path], orders[path] = with_weight(linear, jnp.asarray(kernel.T)), order
    save_model(
        replace_linears(model, linears),
        directory / "pruned",
        like=source,
        metadata={"pattern": "2:4", "layers": {path: {} for path in orders}},
        permutations=orders,
    )
    return directory / "pruned", orders


@pytest.fixture
def copy(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned[0], tmp_path / "copy"))


def put_back(directory: Path, layer: str, row: int, channel: int) -> str:
    """Makes one pruned weight non-zero; gives the file it is in."""
    for file in directory.glob("model*.safetensors"):
        weights = load_file(file)
        if f"{layer}.weight" in weights:
            assert weights[f"{layer}.weight"][row, channel] == 0
            weights[f"{layer}.weight"][row, channel] = 0.5
            save_file(weights, file, metadata={"format": "pt"})
            return file.name
    raise AssertionError(layer)


def edit(directory: Path, **fields) -> None:
    file = directory / "esparse.json"
    kept = json.loads(file.read_text()) | fields
    write_json(file, {k: v for k, v in kept.items() if v != "left out"})


def test_a_pruned_checkpoint_passes_in_the_order_of_its_permutations(pruned):
    directory, orders = pruned
    for pattern in (None, TWO_OF_FOUR):
        result = verify_checkpoint(directory, pattern)
        assert result.ok
        assert (result.layers, result.violations, result.problems) == (14, (), ())
        sizes = [
            w.size // 4 for k, w in tiny_weights().items() if k.removesuffix(".weight") in orders
        ]
        assert result.groups == sum(sizes)
        assert result.summary() == f"ok: 14 layers, {result.groups} groups, all 2:4"
        assert result.as_dict()["ok"] is True
        json.dumps(result.as_dict())


def test_the_order_matters(copy):
    (copy / "esparse.json").unlink()
    result = verify_checkpoint(copy, TWO_OF_FOUR)  # natural order, all decoder linears
    assert not result.ok
    assert result.layers == 14
    assert result.violation_count > 100


def test_one_weight_put_back_is_named(pruned, copy):
    _, orders = pruned
    order = orders[DOWN]
    file = put_back(copy, DOWN, 5, int(order[4 * 3 + 2]))
    result = verify_checkpoint(copy)
    assert not result.ok
    (violation,) = result.violations
    assert (violation.layer, violation.row, violation.group, violation.count) == (DOWN, 5, 3, 3)
    assert violation.channels == tuple(order[12:16])
    assert str(violation) == (
        f"{DOWN}: row 5, group 3 (channels {', '.join(map(str, order[12:16]))}) has 3 non-zeros, "
        f"2:4 allows 2"
    )
    assert result.changed_files == (file,)
    assert f"changed: {file} is not the file that esparse.json" in result.summary()
    assert f"FAILED: 1 of {result.groups} groups in 14 layers are not 2:4" in result.summary()
    assert result.as_dict()["violations"][0]["layer"] == DOWN


def test_a_changed_file_is_reported_when_its_groups_are_still_right(copy):
    file = copy / "model-00001-of-00002.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][3, 4] += 1
    save_file(weights, file, metadata={"format": "pt"})
    result = verify_checkpoint(copy)
    assert (result.ok, result.violations, result.problems) == (False, (), ())
    assert result.changed_files == (file.name,)
    assert "FAILED: 14 layers" in result.summary()
    (copy / "esparse_permutations.safetensors").unlink()
    result = verify_checkpoint(copy)
    assert result.changed_files == ("esparse_permutations.safetensors", file.name)
    assert result.problems[0].startswith("esparse_permutations.safetensors is missing; layers are")


def test_permutations_that_are_none(copy):
    file = copy / "esparse_permutations.safetensors"
    orders = load_file(file)
    orders[f"{DOWN}.permutation"][0] = orders[f"{DOWN}.permutation"][1]
    orders[f"{QUERY}.permutation"] = orders[f"{QUERY}.permutation"][:-1]
    save_file(orders, file)
    result = verify_checkpoint(copy)
    assert not result.ok
    assert result.layers == 12
    assert [p.split(":")[0] for p in result.problems] == [QUERY, DOWN]
    assert f"{DOWN}: its permutation does not hold each of 0..63 once" in result.summary()
    assert result.changed_files == (file.name,)
    file.write_bytes(file.read_bytes()[:100])
    assert "is cut short or no safetensors file" in verify_checkpoint(copy).problems[0]


def test_the_list_of_layers(copy):
    edit(copy, layers=[QUERY, "model.layers.7.mlp.up_proj"])
    result = verify_checkpoint(copy)
    assert (result.ok, result.layers, result.violations) == (False, 1, ())
    assert f"{DOWN}: has a permutation but is not listed as pruned" in result.problems
    assert any(
        p.startswith("model.layers.7.mlp.up_proj: the checkpoint has no") for p in result.problems
    )
    edit(copy, layers=[], permutations=None)
    assert "no layer is listed as pruned" in verify_checkpoint(copy).summary()
    edit(copy, layers="left out", permutations="esparse_permutations.safetensors")
    assert verify_checkpoint(copy).ok


def test_layers_left_dense_are_not_checked(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", tokenizer=False)
    model, _ = load_model(source)
    kernel = np.array(get_linear(model, DOWN).kernel.get_value())
    kernel[np.arange(64) % 4 >= 2] = 0
    model = replace_linears(
        model, {DOWN: with_weight(get_linear(model, DOWN), jnp.asarray(kernel.T))}
    )
    metadata = {"pattern": "2:4", "layers": [DOWN]}
    save_model(model, tmp_path / "out", like=source, metadata=metadata)
    assert verify_checkpoint(tmp_path / "out").ok
    assert verify_checkpoint(tmp_path / "out", NMPattern(4, 8)).ok
    result = verify_checkpoint(tmp_path / "out", NMPattern(1, 4), max_violations=5)
    assert len(result.violations) == 5
    assert result.violation_count == 32 * 16
    assert "507 more groups are not" in result.summary()
    uneven = verify_checkpoint(tmp_path / "out", NMPattern(2, 5))
    assert uneven.problems == (f"{DOWN}: 64 channels are no multiple of 5",)


def test_not_a_number_counts_and_minus_zero_does_not(tmp_path):
    directory = tiny_checkpoint(tmp_path, tokenizer=False, num_hidden_layers=1)
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if "proj" in name:
            weight[:, np.arange(weight.shape[1]) % 4 >= 2] = -0.0
    write_weights(directory, weights)
    assert verify_checkpoint(directory, TWO_OF_FOUR).ok
    weights[f"{QUERY}.weight"][3, 7] = np.nan
    write_weights(directory, weights)
    (violation,) = verify_checkpoint(directory, TWO_OF_FOUR).violations
    assert (violation.layer, violation.row, violation.group) == (QUERY, 3, 1)


def test_a_pattern_must_come_from_somewhere(tmp_path):
    directory = tiny_checkpoint(tmp_path, tokenizer=False)
    with pytest.raises(ValueError, match=r"has no esparse\.json to take the pattern from\. Give"):
        verify_checkpoint(directory)
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        verify_checkpoint(tmp_path / "nowhere", TWO_OF_FOUR)


# The compressed format


@pytest.fixture(scope="module")
def compressed(pruned, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("compressed") / "out"
    compress_checkpoint(pruned[0], directory)
    return directory


@pytest.fixture
def broken(compressed, tmp_path) -> Path:
    return Path(shutil.copytree(compressed, tmp_path / "broken"))


def change(directory: Path, **tensors) -> None:
    """Applies a function to each of the named tensors; None leaves one out."""
    weights = load_file(directory / "model.safetensors")
    for name, function in tensors.items():
        weights[name] = function(weights[name].copy())
    write_weights(directory, {k: v for k, v in weights.items() if v is not None})


def put(place, value):
    def function(array):
        array[place] = value
        return array

    return function


def test_a_compressed_checkpoint_passes_like_the_one_it_was_made_of(pruned, compressed):
    dense = verify_checkpoint(pruned[0])
    assert verify_checkpoint(compressed) == dense
    assert verify_checkpoint(compressed, TWO_OF_FOUR).ok
    assert dense.groups > 0


@pytest.mark.parametrize("pattern", [NMPattern(1, 4), NMPattern(3, 8), NMPattern(2, 8)])
def test_other_patterns_give_the_same_violations_compressed(pruned, compressed, pattern):
    dense = verify_checkpoint(pruned[0], pattern)
    ours = verify_checkpoint(compressed, pattern)
    assert dense.violation_count > 1000
    assert ours == dense
    uneven = verify_checkpoint(compressed, NMPattern(2, 5))
    assert f"{DOWN}: 64 channels are no multiple of 5" in uneven.problems


def test_indices_and_permutations_that_are_not_valid_are_named(broken):
    change(
        broken,
        **{
            f"{DOWN}.indices": put((11, 5), 0x4F),
            f"{QUERY}.permutation": put(3, 31),
            "model.layers.1.mlp.up_proj.permutation": put(3, 400),
        },
    )
    result = verify_checkpoint(broken)
    assert (result.ok, result.layers, result.violations) == (False, 11, ())
    assert result.problems == (
        f"{QUERY}: its permutation does not hold each of 0..31 once, so its groups are not known",
        f"{DOWN}: row 11, group 10: the indices name positions 3 and 3; the first must be below "
        f"the second, so its groups are not known",
        "model.layers.1.mlp.up_proj: its permutation does not hold each of 0..31 once, so its "
        "groups are not known",
    )
    assert result.changed_files == ("model.safetensors",)
    assert f"problem: {DOWN}: row 11, group 10" in result.summary()
    assert "FAILED" in result.summary()


def test_shapes_dtypes_and_names_are_checked(broken):
    change(
        broken,
        **{
            f"{DOWN}.values": lambda array: array[:, :-2].copy(),
            f"{DOWN}.permutation": lambda array: array.astype(np.int64),
            f"{QUERY}.indices": lambda array: None,
            "model.norm.weight": lambda array: array[:-1].copy(),
        },
    )
    edit(broken, layers=[*json.loads((broken / "esparse.json").read_text())["layers"], "lm_tail"])
    result = verify_checkpoint(broken)
    assert not result.ok
    assert result.layers == 12
    assert result.problems == (
        "no such linear: lm_tail, listed in esparse.json",
        f"missing: {QUERY}.indices (32, 4)",
        f"wrong dtype: {DOWN}.permutation is I64, it may be I32",
        f"wrong shape: {DOWN}.values is (32, 30), config.json gives (32, 32)",
        "wrong shape: model.norm.weight is (31,), config.json gives (32,)",
    )


def test_a_changed_value_is_a_changed_file(broken):
    change(broken, **{f"{DOWN}.values": put((3, 4), 2.0)})
    result = verify_checkpoint(broken)
    assert (result.ok, result.layers, result.problems) == (False, 14, ())
    assert result.changed_files == ("model.safetensors",)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is cut short or no safetensors file"):
        verify_checkpoint(broken)


def test_a_compressed_checkpoint_without_layers(broken):
    edit(broken, layers=[])
    result = verify_checkpoint(broken)
    assert "no layer is listed as pruned, so there is nothing to check" in result.problems
    assert f"unexpected: {DOWN}.values (32, 32)" in result.problems
    edit(broken, layers="left out")
    with pytest.raises(ValueError, match="does not list the compressed layers"):
        verify_checkpoint(broken)
