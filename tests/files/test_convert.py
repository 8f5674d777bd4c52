"""The hf format to the compressed one and back, byte for byte."""

import errno
import gc
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_checkpoint, tiny_pruned, write_weights

from esparse_jax.files import (
    compress_checkpoint,
    expand_checkpoint,
    read_esparse,
    read_permutations,
    verify_checkpoint,
    write_json,
)
from esparse_jax.files import tensors as tensors_room
from esparse_jax.pruning import NMPattern

DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """bfloat16 in three files, shuffled."""
    _, directory, orders = tiny_pruned(
        tmp_path_factory.mktemp("pruned"), dtype="bfloat16", shards=3
    )
    return directory, orders


@pytest.fixture(scope="module")
def compressed(pruned, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("compressed") / "out"
    compress_checkpoint(pruned[0], directory)
    return directory


@pytest.fixture
def copy(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned[0], tmp_path / "copy"))


def stored(directory: Path) -> dict[str, np.ndarray]:
    files = directory.glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def same_tensors(one: Path, other: Path) -> None:
    ours, theirs = stored(one), stored(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert value.tobytes() == theirs[name].tobytes(), name


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def edit(directory: Path, **fields) -> None:
    file = directory / "esparse.json"
    kept = json.loads(file.read_text()) | fields
    write_json(file, {k: v for k, v in kept.items() if v != "left out"})


def change(directory: Path, name: str, place: tuple, value) -> None:
    """Puts another value into a stored tensor."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][place] = value
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(name)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float16", "shards": 4},
        {"dtype": "bfloat16", "num_key_value_heads": 4, "shuffled": False},
        {"dtype": "bfloat16", "tie_word_embeddings": True, "shards": 2},
        {"pattern": NMPattern(1, 4), "attention_bias": True, "mlp_bias": True},
        {"intermediate_size": 60, "num_hidden_layers": 1, "tokenizer": False},
        {"skip": ("down_proj", "layers.0.self_attn.o_proj")},
        {"extra": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64)}},
    ],
    ids=lambda options: " ".join(options),
)
def test_round_trip_is_byte_identical(tmp_path, options):
    _, hf, orders = tiny_pruned(tmp_path, **options)
    (hf / "LICENSE").write_text("free")
    done = compress_checkpoint(hf, tmp_path / "compressed")
    assert done.layers == len(orders)
    assert done.positive_zeros == 0
    assert verify_checkpoint(tmp_path / "compressed").ok
    tensors = stored(tmp_path / "compressed")
    assert sum(value.nbytes for value in tensors.values()) == done.written_bytes
    assert not any(f"{layer}.weight" in tensors for layer in orders)

    back = expand_checkpoint(tmp_path / "compressed", tmp_path / "back")
    assert (back.source_bytes, back.written_bytes) == (done.written_bytes, done.source_bytes)
    same_tensors(tmp_path / "back", hf)
    assert verify_checkpoint(tmp_path / "back").ok
    ours, theirs = read_esparse(tmp_path / "back"), read_esparse(hf)
    assert ours["sha256"].pop("source") == theirs["sha256"].pop("source")
    del ours["sha256"], theirs["sha256"]
    assert ours == theirs
    for directory in ("compressed", "back"):
        others = {f.name for f in hf.iterdir() if ".safetensors" not in f.name} - {"esparse.json"}
        for name in others:
            assert (tmp_path / directory / name).read_bytes() == (hf / name).read_bytes()
    compress_checkpoint(tmp_path / "back", tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "compressed")


def test_what_is_written(pruned, compressed):
    hf, orders = pruned
    dense, tensors = stored(hf), stored(compressed)
    for layer, order in orders.items():
        weight = dense[f"{layer}.weight"]
        out, channels = weight.shape
        values, indices = tensors[f"{layer}.values"], tensors[f"{layer}.indices"]
        assert (values.shape, values.dtype) == ((out, channels // 2), weight.dtype)
        assert (indices.shape, indices.dtype) == ((out, channels // 8), np.uint8)
        np.testing.assert_array_equal(tensors[f"{layer}.permutation"], order)
        # Row 3 by hand, from the drawing in Compressed24.
        row = np.zeros(channels, weight.dtype)
        for j, value in enumerate(values[3]):
            position = indices[3, j // 4] >> (2 * (j % 4)) & 3
            row[order[4 * (j // 2) + position]] = value
        np.testing.assert_array_equal(row, weight[3])
    for name in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].tobytes() == dense[name].tobytes()
    assert sorted(f.name for f in compressed.iterdir()) == [
        "config.json",
        "esparse.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    fields, before = read_esparse(compressed), read_esparse(hf)
    assert (fields["format"], fields["format_version"]) == ("compressed", 1)
    assert fields["permutations"] == "<layer>.permutation"
    assert (before["format"], before["permutations"]) == ("hf", "esparse_permutations.safetensors")
    for name in ("pattern", "method", "options", "layers", "esparse_jax"):
        assert fields[name] == before[name]
    assert set(fields["sha256"]["written"]) == {"model.safetensors"}
    for layer, order in read_permutations(compressed).items():
        np.testing.assert_array_equal(order, orders[layer])


def test_natural_orders_are_not_stored(tmp_path):
    _, hf, orders = tiny_pruned(tmp_path, shuffled=False)
    compress_checkpoint(hf, tmp_path / "out")
    assert read_permutations(tmp_path / "out") == {}
    assert read_esparse(tmp_path / "out")["permutations"] is None
    # Given, though natural: they come back.
    save_file(
        {f"{layer}.permutation": order for layer, order in orders.items()},
        hf / "esparse_permutations.safetensors",
    )
    edit(hf, permutations="esparse_permutations.safetensors")
    compress_checkpoint(hf, tmp_path / "out", overwrite=True)
    assert read_permutations(tmp_path / "out") == {}
    expand_checkpoint(tmp_path / "out", tmp_path / "back")
    same_tensors(tmp_path / "back", hf)


def test_in_several_files(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_room, "_SHARD_BYTES", 8_000)
    seen = []
    compress_checkpoint(pruned[0], tmp_path / "out", progress=lambda *step: seen.append(step))
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(tmp_path / "out"))
    assert set(index["weight_map"].values()) == set(files)
    assert all(f.stat().st_size < 20_000 for f in (tmp_path / "out").glob("*.safetensors"))
    assert seen == [(done + 1, len(seen)) for done in range(len(seen))]
    assert len(seen) == len(index["weight_map"])
    assert verify_checkpoint(tmp_path / "out").ok
    expand_checkpoint(tmp_path / "out", tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    same_tensors(tmp_path / "back", pruned[0])


def test_minus_zeros_that_find_no_place_are_counted(copy, tmp_path):
    weight = stored(copy)[f"{DOWN}.weight"]
    order = read_permutations(copy)[DOWN]
    group = order[4:8]
    row = int(np.flatnonzero((weight[:, group] != 0).sum(axis=1) == 2)[0])
    lost = int(group[weight[row, group] == 0][0])
    change(copy, f"{DOWN}.weight", (row, lost), -0.0)
    assert compress_checkpoint(copy, tmp_path / "out").positive_zeros == 1
    expand_checkpoint(tmp_path / "out", tmp_path / "back")
    change(copy, f"{DOWN}.weight", (row, lost), 0.0)
    same_tensors(tmp_path / "back", copy)


def test_a_layer_that_is_not_two_of_four_in_its_order(copy, tmp_path):
    order = read_permutations(copy)[DOWN]
    weight = stored(copy)[f"{DOWN}.weight"]
    column = next(c for c in order[8:12] if weight[7, c] == 0)
    change(copy, f"{DOWN}.weight", (7, int(column)), 0.5)
    with pytest.raises(
        ValueError,
        match=f"{DOWN} is not 2:4 in the order of its permutation.* row 7 has 3 non-zeros in "
        r"group 2 \(channels 8\.\.11 of that order\), where 2 fit\. Give .* `esparse verify`",
    ):
        compress_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    edit(copy, permutations=None)
    with pytest.raises(ValueError, match="is not 2:4 in its natural order"):
        compress_checkpoint(copy, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_what_the_record_says_must_fit(copy, tmp_path):
    file = copy / "esparse_permutations.safetensors"
    orders = load_file(file)
    orders[f"{DOWN}.permutation"][0] = orders[f"{DOWN}.permutation"][1]
    orders[f"{QUERY}.permutation"] = orders[f"{QUERY}.permutation"][:-1]
    orders["model.norm.permutation"] = np.arange(32)
    save_file(orders, file)
    edit(copy, layers=[*json.loads((copy / "esparse.json").read_text())["layers"], "model.norm"])
    with pytest.raises(ValueError, match="does not fit its layers") as error:
        compress_checkpoint(copy, tmp_path / "out")
    error.match(f"{DOWN}: its permutation does not hold each of 0..63 once")
    error.match(f"{QUERY}: its permutation does not hold each of 0..31 once")
    error.match("model.norm: the model has no such linear layer")
    edit(copy, layers=[DOWN])
    with pytest.raises(ValueError, match=f"{QUERY}: has a permutation but is not listed"):
        compress_checkpoint(copy, tmp_path / "out")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks esparse_permutations\.safetensors"):
        compress_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_whose_channels_four_does_not_divide(tmp_path):
    directory = tiny_checkpoint(tmp_path / "in", intermediate_size=62, tokenizer=False)
    write_json(directory / "esparse.json", {"format_version": 1, "pattern": "2:4"})
    with pytest.raises(ValueError, match=f"{DOWN}: 62 channels are no multiple of 4"):
        compress_checkpoint(directory, tmp_path / "out")


def test_directories_that_cannot_be_converted(copy, compressed, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="is in the compressed format already"):
        compress_checkpoint(compressed, out)
    with pytest.raises(ValueError, match="is in the hf format already; there is nothing to expand"):
        expand_checkpoint(copy, out)
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        compress_checkpoint(tmp_path / "nowhere", out)
    edit(copy, pattern="4:8")
    with pytest.raises(ValueError, match=r"4:8 has no compressed form.* all four values of 8"):
        compress_checkpoint(copy, out)
    edit(copy, pattern="2:4", format="torch")
    with pytest.raises(ValueError, match=r"has format 'torch'; this version reads hf, compressed"):
        compress_checkpoint(copy, out)
    (copy / "esparse.json").unlink()
    for convert in (compress_checkpoint, expand_checkpoint):
        with pytest.raises(ValueError, match=r"has no esparse\.json, which says .* save_model\("):
            convert(copy, out)
    file = copy / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    write_json(copy / "esparse.json", {"format_version": 1, "pattern": "2:4"})
    with pytest.raises(ValueError, match="is cut short or no safetensors file"):
        compress_checkpoint(copy, out)
    assert not out.exists()


def test_tensors_that_do_not_fit_are_named(copy, compressed, tmp_path):
    edit_config = json.loads((copy / "config.json").read_text()) | {"vocab_size": 200}
    (copy / "config.json").write_text(json.dumps(edit_config))
    with pytest.raises(ValueError, match=r"wrong shape: lm_head\.weight is \(128, 32\)"):
        compress_checkpoint(copy, tmp_path / "out")
    broken = Path(shutil.copytree(compressed, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors[f"{DOWN}.indices"]
    write_weights(broken, tensors)
    with pytest.raises(ValueError, match=rf"missing: {DOWN}\.indices \(32, 8\)"):
        expand_checkpoint(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_expanding_what_is_not_valid_names_layer_and_row(compressed, tmp_path):
    broken = Path(shutil.copytree(compressed, tmp_path / "broken"))
    change(broken, f"{DOWN}.indices", (9, 2), 0)
    with pytest.raises(ValueError, match=f"{DOWN}: row 9, group 4: the indices name positions 0"):
        expand_checkpoint(broken, tmp_path / "out")
    change(broken, f"{DOWN}.permutation", (0,), 64)
    with pytest.raises(ValueError, match=f"{DOWN}: its permutation does not hold each of 0..63"):
        expand_checkpoint(broken, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_output_rules(pruned, compressed, tmp_path):
    for convert, source in ((compress_checkpoint, pruned[0]), (expand_checkpoint, compressed)):
        out = tmp_path / convert.__name__
        for inside in (source, source.parent):
            with pytest.raises(ValueError, match="is the input checkpoint or holds it"):
                convert(source, inside, overwrite=True)
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=r"is not empty\. Name another .*--overwrite"):
            convert(source, out)
        with pytest.raises(FileExistsError, match="holds no checkpoint"):
            convert(source, out, overwrite=True)
        (out / "notes.txt").unlink()
        convert(source, out)
        whole = snapshot(out)
        (out / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="is not empty"):
            convert(source, out)
        convert(source, out, overwrite=True)
        assert snapshot(out) == whole | {"notes.txt": b"mine"}
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_what_is_interrupted_leaves_everything_as_it_was(
    pruned, compressed, tmp_path, monkeypatch, earlier, error
):
    put = tensors_room._put
    for convert, source in ((compress_checkpoint, pruned[0]), (expand_checkpoint, compressed)):
        out = tmp_path / "out"
        if earlier:
            convert(source, out, overwrite=out.exists())
        before, calls = snapshot(tmp_path), iter(range(100))

        def full(file, data, digest, calls=calls):
            if next(calls) == 7:
                file.write(bytes(data)[:5])
                raise error
            put(file, data, digest)

        monkeypatch.setattr(tensors_room, "_put", full)
        with pytest.raises(type(error)):
            convert(source, out, overwrite=earlier)
        monkeypatch.setattr(tensors_room, "_put", put)
        assert snapshot(tmp_path) == before
        assert out.exists() == earlier


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    _, hf, _ = tiny_pruned(tmp_path, tokenizer=False, **sizes)
    tensors = stored(hf)
    total = sum(value.nbytes for value in tensors.values())
    largest = max(value.nbytes for value in tensors.values())
    assert total > 20 * largest
    del tensors
    for convert, source, out in (
        (compress_checkpoint, hf, tmp_path / "compressed"),
        (expand_checkpoint, tmp_path / "compressed", tmp_path / "back"),
    ):
        gc.collect()
        tracemalloc.start()
        convert(source, out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # A weight as it was read, in the other order, and packed, with the places of some rows.
        assert peak < 5 * largest + 2_000_000, peak / largest
