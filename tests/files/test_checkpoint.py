import dataclasses
import errno
import gc
import hashlib
import json
import math
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_cases import run
from safetensors.numpy import load_file
from tiny import VOCAB, text, tiny_checkpoint, tiny_pruned, tiny_weights, write_weights

from esparse_jax.files import (
    check_output,
    compress_checkpoint,
    expand_checkpoint,
    load_model,
    load_tokenizer,
    read_esparse,
    read_permutations,
    save_model,
    verify_checkpoint,
    write_json,
)
from esparse_jax.files import tensors as tensors_room
from esparse_jax.models.layers import MaskedLinear, SparseLinear
from esparse_jax.models.llama import PRUNED_GROUPS
from esparse_jax.models.surgery import (
    get_linear,
    iter_linears,
    observe,
    replace_linears,
    sparsify_model,
    weight_of,
    with_weight,
)
from esparse_jax.pipeline import prune_model
from esparse_jax.pruning import PruneConfig, init_range
from esparse_jax.sparse import decompress24

DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"
KEY = "model.layers.0.self_attn.k_proj"
OUT = "model.layers.0.self_attn.o_proj"
UP = "model.layers.1.mlp.up_proj"
PRUNED = [f"model.layers.{block}.{p}" for block in (0, 1) for g in PRUNED_GROUPS for p in g]
IDS = np.random.default_rng(1).integers(0, VOCAB, size=(1, 9), dtype=np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """bfloat16 in three files, with a tensor that old checkpoints carry."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(4, dtype=np.float32)}
    return tiny_checkpoint(
        tmp_path_factory.mktemp("tiny") / "source", dtype="bfloat16", shards=3, extra=extra
    )


@pytest.fixture(scope="module")
def loaded(source):
    return load_model(source)


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def masked_at_two_of_four(model, paths, *, onto=None):
    """Every second pair of channels is pruned; onto: in another model with the same layers."""
    linears = {path: get_linear(model, path) for path in paths}
    pruned = {}
    for path, linear in linears.items():
        weight = weight_of(linear)
        kept = (jnp.arange(weight.shape[1]) % 4 < 2)[None]
        pruned[path] = with_weight(linear, jnp.where(kept, weight, jnp.zeros((), weight.dtype)))
    return replace_linears(onto or model, pruned)


def stored(directory: Path) -> dict[str, np.ndarray]:
    return {k: v for f in directory.glob("model*.safetensors") for k, v in load_file(f).items()}


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def edit_config(directory: Path, **fields) -> None:
    file = directory / "config.json"
    kept = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in kept.items() if v != "left out"}))


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


# Loading


def test_parameters_are_the_stored_tensors(source, loaded):
    model, tokenizer = loaded
    weights = stored(source)
    assert model.config.dtype == "bfloat16"
    assert model.dtype == jnp.bfloat16
    for path, linear in iter_linears(model):
        assert linear.kernel.get_value().dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(linear.kernel.get_value()).T, weights[f"{path}.weight"]
        )
    embedding = np.asarray(model.model.embed_tokens.embedding.get_value())
    np.testing.assert_array_equal(embedding, weights["model.embed_tokens.weight"])
    scale = np.asarray(model.model.norm.scale.get_value())
    np.testing.assert_array_equal(scale, weights["model.norm.weight"])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    prompt = text(12).strip()
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


def test_one_file_and_several_give_the_same_model(source, loaded, tmp_path):
    single = tiny_checkpoint(tmp_path, dtype="bfloat16", tokenizer=False)
    model, tokenizer = load_model(single)
    assert tokenizer is None
    np.testing.assert_array_equal(run(model, IDS), run(loaded[0], IDS))


def test_dtype_converts_parameters_and_arithmetic(source, loaded):
    model, _ = load_model(source, dtype="float32")
    assert model.config.dtype == "float32"
    kernel = get_linear(model, DOWN).kernel.get_value()
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, get_linear(loaded[0], DOWN).kernel.get_value())
    for given, said in (("int8", "'int8'"), (float, "<class 'float'>"), ("half-ish", "'half-ish'")):
        with pytest.raises(ValueError, match=f"dtype is {said}; it must be one of float32, bfloat"):
            load_model(source, dtype=given)


@pytest.mark.parametrize("given", [jnp.float16, np.float16, np.dtype("float16"), "f2"])
def test_a_dtype_is_as_good_as_its_name(source, given):
    model, _ = load_model(source, dtype=given)
    assert (model.config.dtype, model.dtype) == ("float16", jnp.float16)
    assert get_linear(model, DOWN).kernel.get_value().dtype == jnp.float16


def test_without_a_dtype_in_the_configuration_the_embedding_decides(copy):
    edit_config(copy, torch_dtype="left out")
    assert load_model(copy)[0].config.dtype == "bfloat16"


def test_missing_unexpected_and_misshapen_tensors_are_one_error(tmp_path):
    directory = tiny_checkpoint(tmp_path)
    weights = tiny_weights()
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.gate.weight"] = np.zeros((2, 3), np.float32)
    weights["lm_head.weight"] = np.zeros((VOCAB, 31), np.float32)
    weights[f"{DOWN}.weight"] = weights[f"{DOWN}.weight"].astype(np.float64)
    write_weights(directory, weights)
    with pytest.raises(ValueError, match=r"do not fit its config.json; 4 disagreements") as error:
        load_model(directory)
    error.match(r"missing: model\.norm\.weight \(32,\)")
    error.match(r"unexpected: model\.layers\.0\.mlp\.gate\.weight \(2, 3\)")
    error.match(r"wrong shape: lm_head\.weight is \(128, 31\), config\.json gives \(128, 32\)")
    error.match(r"wrong dtype: .*down_proj\.weight is F64, it may be F32, BF16, F16")


@pytest.mark.parametrize(
    ("dtype", "bad"), [("float32", np.nan), ("float16", np.inf), ("bfloat16", -np.inf)]
)
def test_weights_that_are_not_finite_are_named(tmp_path, dtype, bad):
    directory = tiny_checkpoint(tmp_path, dtype=dtype, tokenizer=False, num_hidden_layers=1)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] = bad
    weights["model.embed_tokens.weight"][[4, 5], 6] = bad
    write_weights(directory, weights)
    with pytest.raises(FloatingPointError, match="weights that are NaN or Inf") as error:
        load_model(directory)
    error.match(r"model\.norm\.weight: 1 of 32 are NaN or Inf")
    error.match(r"model\.embed_tokens\.weight: 2 of 4096 are NaN or Inf")
    model, _ = load_model(directory, check_finite=False)
    assert not bool(jnp.isfinite(model.model.norm.scale.get_value()[3]))


def test_weights_too_large_for_the_dtype_asked_for_are_named(tmp_path):
    directory = tiny_checkpoint(tmp_path, tokenizer=False, num_hidden_layers=1)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    write_weights(directory, weights)
    with pytest.raises(
        FloatingPointError, match=r"norm\.weight: 1 of 32 are too large for float16"
    ):
        load_model(directory, dtype="float16")


def test_tied_head_is_the_embedding(tmp_path):
    directory = tiny_checkpoint(tmp_path / "a", tie_word_embeddings=True, tokenizer=False)
    model, _ = load_model(directory)
    assert not hasattr(model, "lm_head")
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    write_weights(directory, weights)
    again, _ = load_model(directory)
    np.testing.assert_array_equal(run(again, IDS), run(model, IDS))
    save_model(again, tmp_path / "out", like=directory)
    assert snapshot(tmp_path / "out") == snapshot(directory)
    weights["lm_head.weight"][0, 0] += 1
    write_weights(directory, weights)
    with pytest.raises(ValueError, match=r"not tied: lm_head\.weight differs from model\.embed"):
        load_model(directory)


def test_directory_configuration_and_weights_must_be_there(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere. Give the checkpoint dir"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(tmp_path / "empty")
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 3 files .* model-00002-of-00003"):
        load_model(copy)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor .*; it has: "):
        load_model(copy)


@pytest.mark.parametrize("length", [4, 20, 3000, -1])
def test_truncated_file(copy, length):
    file = copy / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.safetensors .* is cut short or"):
        load_model(copy)


def test_index_that_does_not_fit(copy):
    index = copy / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"][f"{DOWN}.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"does not agree with the files.*\n{DOWN}.weight is not"):
        load_model(copy)
    for broken in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match="is no index of safetensors files"):
            load_model(copy)


def test_configuration_errors_name_the_file(copy):
    edit_config(copy, sliding_window=7)
    with pytest.raises(ValueError, match=r"copy/config\.json: .*sliding_window=7"):
        load_model(copy)
    edit_config(copy, model_type="mistral")
    with pytest.raises(ValueError, match=r"config\.json: model_type 'mistral' is not supported"):
        load_model(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold one JSON object"):
        load_model(copy)


def test_tokenizer_with_ids_beyond_the_embedding(tmp_path):
    directory = tiny_checkpoint(tmp_path, vocab_size=100)
    with pytest.raises(
        ValueError, match=r"has ids up to 127, but the model has embeddings for 100 ids"
    ):
        load_model(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"The tokenizer of .* cannot be read"):
        load_tokenizer(directory)


# Saving


def test_saved_like_its_source_is_its_source(source, loaded, tmp_path):
    for name, dtype in (("own", None), ("wide", "float32"), ("narrow", "float16")):
        model = loaded[0] if dtype is None else load_model(source, dtype=dtype)[0]
        save_model(model, tmp_path / name, like=source)
        assert snapshot(tmp_path / name) == snapshot(source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_kept_weights_keep_their_bytes_and_pruned_ones_are_plus_zero(tmp_path, dtype):
    source = tiny_checkpoint(tmp_path / "source", tokenizer=False)
    weights = load_file(source / "model.safetensors")
    row = weights[f"{DOWN}.weight"][0]
    row[:4] = -0.0  # two kept, two pruned
    row[4:8] = 1e-41, -1e-41, 1e-41, -1e-41  # nothing in 16 bit
    write_weights(source, weights)
    model = masked_at_two_of_four(load_model(source, dtype=dtype)[0], [DOWN])
    save_model(model, tmp_path / "out", like=source)
    after = stored(tmp_path / "out")
    for name, before in weights.items():
        expected = before.copy()
        if name == f"{DOWN}.weight":
            expected[:, np.arange(64) % 4 >= 2] = 0.0
            if dtype != "float32":
                expected[0, 4:6] = 0.0, -0.0  # a zero in the model is a zero in the file
        np.testing.assert_array_equal(bits(after[name]), bits(expected), err_msg=name)


def test_esparse_files(source, loaded, tmp_path):
    model = masked_at_two_of_four(loaded[0], [DOWN, QUERY])
    orders = {DOWN: np.arange(64, dtype=np.int32)[::-1], QUERY: jnp.arange(32)}
    metadata = {"pattern": "2:4", "method": "esparse", "layers": {DOWN: {"kept_share": 0.5}}}
    save_model(model, tmp_path / "out", like=source, metadata=metadata, permutations=orders)
    out = tmp_path / "out"
    fields = read_esparse(out)
    assert fields["format_version"] == 1
    assert fields["permutations"] == "esparse_permutations.safetensors"
    assert metadata.items() <= fields.items()
    assert set(fields["sha256"]["source"]) == {f.name for f in source.glob("*.safetensors")}
    for kind, directory in (("source", source), ("written", out)):
        for name, digest in fields["sha256"][kind].items():
            assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
    assert set(fields["sha256"]["written"]) == {f.name for f in out.glob("*.safetensors")}
    named = load_file(out / "esparse_permutations.safetensors")
    assert set(named) == {f"{DOWN}.permutation", f"{QUERY}.permutation"}
    for path, order in read_permutations(out).items():
        assert order.dtype == np.int32
        np.testing.assert_array_equal(order, orders[path])
    assert read_esparse(source) is None
    assert read_permutations(source) == {}
    # Saving the pruned checkpoint again without metadata: it is no longer known to be pruned.
    save_model(load_model(out)[0], tmp_path / "again", like=out)
    assert not list((tmp_path / "again").glob("esparse*"))


def test_esparse_json_of_a_later_format(copy):
    write_json(copy / "esparse.json", {"format_version": 2})
    with pytest.raises(ValueError, match=r"format_version 2; this version reads 1 to 1\. Install"):
        read_esparse(copy)


def test_permutations_and_layers_are_checked(loaded, tmp_path):
    model, out = loaded[0], tmp_path / "out"
    order = np.arange(64, dtype=np.int32)
    with pytest.raises(ValueError, match="permutations need metadata"):
        save_model(model, out, permutations={DOWN: order})
    with pytest.raises(ValueError, match=r"metadata\['pattern'\] is None; esparse.json needs"):
        save_model(model, out, metadata={})
    with pytest.raises(ValueError, match="keeps N of every M"):
        save_model(model, out, metadata={"pattern": "5:4"})
    order[0] = 1
    with pytest.raises(ValueError, match="do not fit the model") as error:
        save_model(
            model,
            out,
            metadata={"pattern": "2:4", "layers": ["here"]},
            permutations={DOWN: order, "model.norm": order},
        )
    error.match(f"{DOWN}: not each of 0..63 once")
    error.match("model.norm: the model has no such linear layer")
    error.match(r"here: listed in metadata\['layers'\], but")
    assert not out.exists()


def test_without_a_source_parameters_are_written_as_held(loaded, tmp_path, monkeypatch):
    model, tokenizer = loaded
    save_model(model, tmp_path / "one", tokenizer=tokenizer)
    again, its_tokenizer = load_model(tmp_path / "one")
    assert again.config == model.config
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    np.testing.assert_array_equal(run(again, IDS), run(model, IDS))
    monkeypatch.setattr(tensors_room, "_SHARD_BYTES", 10_000)
    save_model(model, tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        v.nbytes for v in stored(tmp_path / "one").values()
    )
    split, _ = load_model(tmp_path / "many")
    np.testing.assert_array_equal(run(split, IDS), run(model, IDS))


def test_config_names_the_dtype_that_is_written(source, tmp_path):
    save_model(load_model(source, dtype="float32")[0], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert {v.dtype for v in stored(tmp_path / "out").values()} == {np.dtype(np.float32)}


def test_masked_layers_are_written_masked_and_compressed_ones_refused(loaded, tmp_path):
    model = loaded[0]
    linear = get_linear(model, DOWN)
    mask = jnp.broadcast_to(jnp.arange(64) % 4 < 2, (32, 64))
    save_model(replace_linears(model, {DOWN: MaskedLinear(linear, mask)}), tmp_path / "out")
    weight = stored(tmp_path / "out")[f"{DOWN}.weight"]
    np.testing.assert_array_equal(weight != 0, mask)
    sparse = sparsify_model(masked_at_two_of_four(model, [DOWN]), {DOWN: None})
    with pytest.raises(TypeError, match=f"Save the pruned model.*\n{DOWN}: SparseLinear"):
        save_model(sparse, tmp_path / "sparse")


def test_source_of_another_model_is_refused(source, tmp_path):
    other, _ = load_model(tiny_checkpoint(tmp_path / "other", rms_norm_eps=1e-3, tokenizer=False))
    with pytest.raises(ValueError, match=r"differ in rms_norm_eps: 0\.001 and 1e-05\. Give"):
        save_model(other, tmp_path / "out", like=source)
    assert not (tmp_path / "out").exists()


def test_output_directory_is_checked(source, loaded, tmp_path):
    model, out = loaded[0], tmp_path / "out"
    out.mkdir()
    check_output(out)  # empty is fine
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out is not empty\. Name another .*--overwrite"):
        save_model(model, out, like=source)
    with pytest.raises(FileExistsError, match=r"holds no checkpoint .*so it is not overwritten"):
        save_model(model, out, like=source, overwrite=True)
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file\. Name a directory"):
        check_output(out / "notes.txt")
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file\. Name another place"):
        check_output(out / "notes.txt" / "deep" / "out")
    for inside in (source, source.parent, source / "x" / ".."):
        with pytest.raises(ValueError, match="is the input checkpoint or holds it"):
            check_output(inside, like=source, overwrite=True)
    assert snapshot(out) == {"notes.txt": b"mine"}


def test_output_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch):
    asked = []

    def mkdtemp(suffix, prefix, folder):
        asked.append(folder)
        raise PermissionError(errno.EACCES, "Permission denied")

    check_output(tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with pytest.raises(
        OSError, match=r"out cannot be written: .* nothing new \(Permission denied\)"
    ):
        check_output(tmp_path / "new" / "out")
    assert asked == [tmp_path]


def test_overwriting_replaces_the_checkpoint_and_keeps_other_files(source, loaded, tmp_path):
    model, out = loaded[0], tmp_path / "out"
    save_model(model, out, metadata={"pattern": "2:4"}, permutations={DOWN: np.arange(64)})
    (out / "README.md").write_text("mine")
    (out / "folder").mkdir()
    (out / "folder" / "file").write_text("mine too")
    save_model(model, out, like=source, overwrite=True)
    expected = snapshot(source) | {"README.md": b"mine", "folder/file": b"mine too"}
    assert snapshot(out) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("like", [False, True])
def test_a_write_that_fails_leaves_everything_as_it_was(
    source, loaded, tmp_path, monkeypatch, earlier, like
):
    out = tmp_path / "out"
    if earlier:
        save_model(loaded[0], out)
    before = snapshot(tmp_path)
    put, calls = tensors_room._put, iter(range(100))

    def full(file, data, digest):
        if next(calls) == 7:
            file.write(bytes(data)[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        put(file, data, digest)

    monkeypatch.setattr(tensors_room, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(loaded[0], out, like=source if like else None, overwrite=earlier)
    assert snapshot(tmp_path) == before
    assert out.exists() == earlier


def test_the_earlier_checkpoint_returns_when_the_new_one_cannot_take_its_place(
    loaded, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    save_model(loaded[0], out)
    before, rename = snapshot(tmp_path), Path.rename

    def failing(self, target):
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        save_model(loaded[0], out, metadata={"pattern": "2:4"}, overwrite=True)
    assert snapshot(tmp_path) == before


def test_write_json(tmp_path):
    @dataclasses.dataclass
    class Record:
        values: tuple
        path: Path

    file = tmp_path / "new" / "file.json"
    record = Record((np.float32(0.5), jnp.arange(2), math.inf, None, True), tmp_path)
    write_json(file, {"record": record, 3: np.int64(4)})
    expected = {
        "record": {"values": [0.5, [0, 1], None, None, True], "path": str(tmp_path)},
        "3": 4,
    }
    assert json.loads(file.read_text()) == expected
    assert [p.name for p in file.parent.iterdir()] == ["file.json"]


# The compressed format


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A bfloat16 source, the same pruned as hf, and compressed; one layer in the natural order."""
    directory = tmp_path_factory.mktemp("compressed")
    source, hf, orders = tiny_pruned(
        directory, dtype="bfloat16", shards=2, intermediate_size=72, attention_bias=True
    )
    model, _ = load_model(hf)
    model = masked_at_two_of_four(load_model(source)[0], [QUERY], onto=model)
    metadata = read_esparse(hf)
    orders[QUERY] = np.arange(32)
    options = {"like": source, "metadata": metadata, "permutations": orders}
    save_model(model, hf, overwrite=True, **options)
    save_model(model, directory / "compressed", format="compressed", **options)
    return source, hf, directory / "compressed"


@pytest.fixture
def broken(compressed, tmp_path) -> Path:
    return Path(shutil.copytree(compressed[2], tmp_path / "broken"))


def rewrite(directory: Path, change) -> None:
    """Stores what a function makes of the tensors."""
    weights = stored(directory)
    change(weights)
    write_weights(directory, weights)


def test_pruned_layers_of_a_compressed_directory_are_compressed(compressed):
    _, hf, directory = compressed
    model, tokenizer = load_model(directory)
    assert tokenizer is not None
    assert model.dtype == jnp.bfloat16
    weights, dense = stored(directory), stored(hf)
    for path, linear in iter_linears(model):
        if path == "lm_head":
            assert isinstance(linear, nnx.Linear)
            continue
        assert isinstance(linear, SparseLinear)
        held = linear.weight.get_value()
        assert held.shape == (linear.out_features, linear.in_features)
        assert (held.dtype, linear.dtype) == (jnp.bfloat16, jnp.bfloat16)
        np.testing.assert_array_equal(held.values, weights[f"{path}.values"])
        np.testing.assert_array_equal(held.indices, weights[f"{path}.indices"])
        assert (linear.permutation is None) == (path == QUERY)
        order = np.arange(linear.in_features)
        if path != QUERY:
            order = weights[f"{path}.permutation"]
            np.testing.assert_array_equal(linear.permutation[...], order)
        np.testing.assert_array_equal(decompress24(held), dense[f"{path}.weight"][:, order])
        assert (linear.bias is not None) == ("self_attn" in path)
        if linear.bias is not None:
            np.testing.assert_array_equal(linear.bias[...], dense[f"{path}.bias"])
    # The same model as the one made in memory.
    made = sparsify_model(load_model(hf)[0], {p: read_permutations(hf).get(p) for p in PRUNED})
    np.testing.assert_array_equal(run(model, IDS), run(made, IDS))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_converts_compressed_values(compressed, dtype):
    model, _ = load_model(compressed[2], dtype=dtype)
    held = get_linear(model, DOWN).weight.get_value()
    assert held.dtype == get_linear(model, DOWN).dtype == jnp.dtype(dtype)
    expected = stored(compressed[2])[f"{DOWN}.values"].astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(held.values, expected)
    assert held.indices.dtype == jnp.uint8


def test_compressed_tensors_that_do_not_fit_are_one_error(broken):
    def change(weights):
        del weights[f"{DOWN}.indices"]
        weights[f"{QUERY}.values"] = weights[f"{QUERY}.values"][:, :-1].copy()
        weights[f"{QUERY}.indices"] = weights[f"{QUERY}.indices"].astype(np.int8)
        weights[f"{UP}.permutation"] = weights[f"{UP}.permutation"].astype(np.int64)
        weights[f"{KEY}.permutation"] = weights[f"{KEY}.permutation"][:-1]
        weights[f"{OUT}.weight"] = np.zeros((32, 32), np.float32)
        weights["lm_head.values"] = np.zeros((128, 16), np.float32)

    rewrite(broken, change)
    fields = read_esparse(broken)
    fields["layers"]["model.layers.7.mlp.up_proj"] = {}
    write_json(broken / "esparse.json", fields)
    with pytest.raises(ValueError, match=r"do not fit its config\.json; 8 disagreements") as error:
        load_model(broken)
    error.match(r"no such linear: model\.layers\.7\.mlp\.up_proj, listed in esparse\.json")
    error.match(rf"missing: {DOWN}\.indices \(32, 9\)")
    error.match(rf"wrong shape: {QUERY}\.values is \(32, 15\), config\.json gives \(32, 16\)")
    error.match(rf"wrong dtype: {QUERY}\.indices is I8, it may be U8")
    error.match(rf"wrong dtype: {UP}\.permutation is I64, it may be I32")
    error.match(rf"wrong shape: {KEY}\.permutation is \(31,\), config\.json gives \(32,\)")
    error.match(rf"unexpected: {OUT}\.weight \(32, 32\)")
    error.match(r"unexpected: lm_head\.values \(128, 16\)")


def test_a_compressed_layer_of_uneven_channels_is_named(broken):
    edit_config(broken, intermediate_size=70)
    with pytest.raises(ValueError, match=rf"not compressible: {DOWN} has 70 channels, no multiple"):
        load_model(broken)


def test_without_its_record_a_compressed_directory_is_recognised(broken):
    (broken / "esparse.json").unlink()
    with pytest.raises(
        ValueError, match=r"or the esparse\.json of a compressed checkpoint is not there:\nmissing"
    ):
        load_model(broken)
    write_json(broken / "esparse.json", {"format_version": 1, "format": "compressed"})
    with pytest.raises(ValueError, match="does not list the compressed layers"):
        load_model(broken)


def test_indices_permutations_and_numbers_that_are_not_valid_are_one_error(broken):
    def change(weights):
        weights[f"{QUERY}.indices"][5, 3] = 0x40  # low nibble 0
        weights[f"{DOWN}.indices"][30, -1] = 0x94  # valid, and 72 channels are 18 groups
        weights[f"{KEY}.indices"][[2, 8], 1] = 0x0F
        weights[f"{UP}.permutation"][4] = 0
        weights[f"{OUT}.values"][1, 1] = np.nan

    rewrite(broken, change)
    with pytest.raises(ValueError, match="compressed layers whose values have no place") as error:
        load_model(broken)
    error.match(f"{QUERY}: row 5, group 6: the indices name positions 0 and 0; the first must be b")
    error.match(f"{KEY}: row 2, group 2: .* positions 3 and 3; .*; 2 of 64 index bytes are wrong")
    error.match(f"{UP}: its permutation does not hold each of 0..31 once")
    error.match(rf"{OUT}\.values: 1 of 512 are NaN or Inf")
    assert DOWN not in str(error.value)

    def mend(weights):
        for layer in (QUERY, DOWN, KEY):
            weights[f"{layer}.indices"][:] = 0x44
        weights[f"{UP}.permutation"][:] = np.arange(32)

    rewrite(broken, mend)
    with pytest.raises(FloatingPointError, match=rf"{OUT}\.values: 1 of 512 are NaN or Inf"):
        load_model(broken)
    load_model(broken, check_finite=False)


def test_the_nibble_behind_an_odd_number_of_groups_is_checked(tmp_path):
    _, hf, _ = tiny_pruned(tmp_path, tokenizer=False, intermediate_size=60)
    compress_checkpoint(hf, tmp_path / "out")
    load_model(tmp_path / "out")
    rewrite(tmp_path / "out", lambda weights: weights[f"{DOWN}.indices"].__ior__(0x40))
    with pytest.raises(ValueError, match=f"{DOWN}: row 0: the last index byte holds one group"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize("length", [4, 20, 3000, -1])
def test_truncated_compressed_file(broken, length):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors .* is cut short or"):
        load_model(broken)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compressed_is_what_hf_is_when_compressed(tmp_path, dtype):
    """Kept values have the source's bytes, whatever the model computes in."""
    source = tiny_checkpoint(tmp_path / "source", tokenizer=False)
    model = masked_at_two_of_four(load_model(source, dtype=dtype)[0], [DOWN, QUERY])
    options = {"like": source, "metadata": {"pattern": "2:4", "layers": [DOWN, QUERY]}}
    save_model(model, tmp_path / "hf", **options)
    save_model(model, tmp_path / "one", format="compressed", **options)
    compress_checkpoint(tmp_path / "hf", tmp_path / "two")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    for layer in (DOWN, QUERY):
        weight = load_file(source / "model.safetensors")[f"{layer}.weight"]
        kept = weight[:, np.arange(weight.shape[1]) % 4 < 2]
        values = stored(tmp_path / "one")[f"{layer}.values"]
        np.testing.assert_array_equal(bits(values), bits(np.ascontiguousarray(kept)))
    linear = get_linear(load_model(source)[0], DOWN)
    mask = jnp.broadcast_to(jnp.arange(64) % 4 < 2, (32, 64))
    masked = replace_linears(model, {DOWN: MaskedLinear(linear, mask)})
    save_model(masked, tmp_path / "masked", format="compressed", **options)
    assert snapshot(tmp_path / "masked") == snapshot(tmp_path / "one")


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_compressed_models_are_saved_compressed(compressed, tmp_path, dtype):
    source, hf, directory = compressed
    model, _ = load_model(directory, dtype=dtype)
    metadata = read_esparse(directory)
    # Like the compressed directory, the pruned one, and the one before pruning.
    for number, like in enumerate((directory, hf, source)):
        out = tmp_path / f"{number}"
        save_model(model, out, format="compressed", like=like, metadata=metadata)
        ours, theirs = stored(out), stored(directory)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.tobytes() == theirs[name].tobytes(), name
        assert read_esparse(out)["layers"] == metadata["layers"]
        assert read_esparse(out)["permutations"] == "<layer>.permutation"
    save_model(model, tmp_path / "held", format="compressed")
    fields = read_esparse(tmp_path / "held")
    assert (fields["pattern"], sorted(fields["layers"])) == ("2:4", sorted(PRUNED))
    again, _ = load_model(tmp_path / "held")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    assert verify_checkpoint(tmp_path / "held").ok


def test_changed_compressed_values_are_written(compressed, tmp_path):
    model, _ = load_model(compressed[2], dtype="float32")
    linear = get_linear(model, DOWN)
    held = linear.weight.get_value()
    linear.weight.set_value(dataclasses.replace(held, values=held.values.at[3, 4].set(7.0)))
    metadata = read_esparse(compressed[2])
    save_model(model, tmp_path / "out", format="compressed", like=compressed[2], metadata=metadata)
    ours, theirs = stored(tmp_path / "out"), stored(compressed[2])
    expected = theirs[f"{DOWN}.values"].copy()
    expected[3, 4] = 7
    np.testing.assert_array_equal(ours[f"{DOWN}.values"], expected)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours if DOWN not in name)


def test_dense_models_need_to_say_what_was_pruned(loaded, source, tmp_path):
    model, out = masked_at_two_of_four(loaded[0], [DOWN, QUERY]), tmp_path / "out"
    compressed = {"format": "compressed", "like": source}
    with pytest.raises(ValueError, match="without metadata nobody can tell which they are"):
        save_model(model, out, **compressed)
    with pytest.raises(ValueError, match=r"4:8 has no compressed form: .* 2:4 and 1:4 fit"):
        save_model(model, out, metadata={"pattern": "4:8", "layers": [DOWN]}, **compressed)
    # Neither layers nor permutations: all decoder linears, of which most are dense here.
    with pytest.raises(ValueError, match=r"is not 2:4 in its natural order.* row 0 has 4 non-z"):
        save_model(model, out, metadata={"pattern": "2:4"}, **compressed)
    order = {DOWN: jnp.arange(64)[::-1]}
    save_model(model, out, metadata={"pattern": "2:4"}, permutations=order, **compressed)
    assert read_esparse(out)["layers"] == [DOWN]
    assert [path for path, linear in iter_linears(load_model(out)[0]) if path == DOWN] == [DOWN]
    assert not list(tmp_path.glob(".*"))


def test_layers_that_cannot_be_written_compressed_are_named(loaded, compressed, tmp_path):
    (model, _), (dense, _) = load_model(compressed[2]), load_model(compressed[1])
    metadata, orders = read_esparse(compressed[2]), read_permutations(compressed[2])
    kinds = {"format": "compressed"}
    few = metadata | {"layers": {QUERY: {}}}
    with pytest.raises(ValueError, match="cannot be written in the compressed format") as error:
        save_model(model, tmp_path / "out", metadata=few, **kinds)
    error.match(f"{DOWN}: compressed in the model, but not listed in metadata")
    with pytest.raises(ValueError, match=f"{KEY}: has a permutation, but is not listed"):
        save_model(dense, tmp_path / "out", metadata=few, permutations=orders, **kinds)
    other = orders | {DOWN: np.roll(orders[DOWN], 1), QUERY: np.arange(32)}
    with pytest.raises(ValueError, match=f"format:\n{DOWN}: compressed in another order than perm"):
        save_model(model, tmp_path / "out", metadata=metadata, permutations=other, **kinds)
    save_model(model, tmp_path / "out", metadata=metadata, permutations=orders, **kinds)
    odd, _ = load_model(tiny_checkpoint(tmp_path / "odd", tokenizer=False, intermediate_size=70))
    few = {"pattern": "2:4", "layers": [DOWN]}
    with pytest.raises(ValueError, match=f"{DOWN}: 70 channels are no multiple of 4"):
        save_model(odd, tmp_path / "no", metadata=few, **kinds)
    watched = observe(loaded[0], {DOWN: init_range(64)})
    with pytest.raises(TypeError, match=f"take them out with unobserve.\n{DOWN}: ObservedLinear"):
        save_model(watched, tmp_path / "no", metadata={"pattern": "2:4"}, **kinds)


def test_an_hf_directory_is_not_written_like_a_compressed_one(compressed, tmp_path):
    model, _ = load_model(compressed[1])
    with pytest.raises(ValueError, match=r"is a compressed checkpoint; .* \(esparse expand\)"):
        save_model(model, tmp_path / "out", like=compressed[2])
    # The other way round it can be.
    orders = read_permutations(compressed[1])
    options = {"metadata": read_esparse(compressed[1]), "permutations": orders}
    save_model(model, tmp_path / "out", format="compressed", like=compressed[2], **options)
    ours, theirs = stored(tmp_path / "out"), stored(compressed[2])
    assert all(ours[name].tobytes() == value.tobytes() for name, value in theirs.items())
    with pytest.raises(TypeError, match=r"SparseLinear holds no dense weight.*esparse expand"):
        prune_model(load_model(compressed[2])[0], IDS, PruneConfig())


@pytest.mark.parametrize("earlier", [False, True])
def test_a_compressed_write_that_fails_leaves_everything_as_it_was(
    compressed, tmp_path, monkeypatch, earlier
):
    model, _ = load_model(compressed[2])
    out, options = tmp_path / "out", {"format": "compressed", "like": compressed[0]}
    if earlier:
        save_model(model, out, **options)
    before = snapshot(tmp_path)
    put, calls = tensors_room._put, iter(range(100))

    def full(file, data, digest):
        if next(calls) == 7:
            raise KeyboardInterrupt
        put(file, data, digest)

    monkeypatch.setattr(tensors_room, "_put", full)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, out, overwrite=earlier, **options)
    assert snapshot(tmp_path) == before
    assert out.exists() == earlier


def test_a_compressed_model_is_never_dense(tmp_path, monkeypatch):
    """Loading holds the compressed arrays and, on the host, one tensor more."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    _, hf, _ = tiny_pruned(tmp_path, tokenizer=False, **sizes)
    compress_checkpoint(hf, tmp_path / "out")
    sizes = {name: value.nbytes for name, value in stored(tmp_path / "out").items()}
    dense = sum(value.nbytes for value in stored(hf).values())
    shapes = {(256, 256), (1024, 256), (256, 1024)}
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    read, done, held = tensors_room.TensorFiles.read, [], []

    def live() -> int:
        arrays = [array for array in jax.live_arrays() if id(array) not in before]
        assert not any(array.shape in shapes and array.dtype != jnp.uint8 for array in arrays)
        return sum(array.nbytes for array in arrays)

    def watched(self, name):
        held.append(live() - sum(done))
        values = read(self, name)
        done.append(values.nbytes)
        return values

    monkeypatch.setattr(tensors_room.TensorFiles, "read", watched)
    tracemalloc.start()
    model, _ = load_model(tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(done) == len(sizes)
    assert max(held) <= max(done)
    assert live() == sum(sizes.values()) < 0.6 * dense
    assert len([p for p, linear in iter_linears(model) if isinstance(linear, SparseLinear)]) == 42
    # On the CPU the arrays may be the memory that was read.
    assert peak < sum(sizes.values()) + 3 * max(sizes.values()) + 4_000_000 < 0.8 * dense


# transformers


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_the_pruned_checkpoint_and_gives_our_logits(tmp_path, tied):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint(tmp_path / "source", shards=2, tie_word_embeddings=tied)
    model = masked_at_two_of_four(load_model(source)[0], [DOWN, QUERY])
    save_model(model, tmp_path / "like", like=source, metadata={"pattern": "2:4"})
    save_model(model, tmp_path / "new")
    metadata = {"pattern": "2:4", "layers": [DOWN, QUERY]}
    save_model(model, tmp_path / "small", format="compressed", like=source, metadata=metadata)
    expand_checkpoint(tmp_path / "small", tmp_path / "back")
    for directory in (tmp_path / "like", tmp_path / "new", tmp_path / "back"):
        theirs = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        assert theirs.dtype == torch.float32
        with torch.no_grad():
            wanted = theirs(torch.tensor(IDS).long()).logits.numpy()
        ours = np.asarray(run(load_model(directory)[0], IDS))
        assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_checkpoint_that_transformers_wrote_loads(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs(torch.tensor(IDS).long()).logits.numpy()
    ours = np.asarray(run(load_model(tmp_path)[0], IDS))
    assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_no_second_copy_of_the_weights(source, monkeypatch):
    """The model starts without arrays and grows by one tensor at a time."""
    gc.collect()
    start = sum(array.nbytes for array in jax.live_arrays())
    read, done, sizes = tensors_room.TensorFiles.read, [], []

    def watched(self, name):
        held = sum(array.nbytes for array in jax.live_arrays()) - start
        values = read(self, name)
        sizes.append(held - sum(done))
        done.append(values.nbytes)
        return values

    monkeypatch.setattr(tensors_room.TensorFiles, "read", watched)
    load_model(source)
    assert len(done) == 21
    assert max(sizes) <= max(done)
