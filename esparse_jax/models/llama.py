"""LLaMA in Flax NNX: configuration, rotary positions, modules and the family's tables.

Attribute names are the checkpoint's: the state path `('model', 'layers', 0, 'self_attn', 'q_proj',
'kernel')` is the checkpoint's `model.layers.0.self_attn.q_proj.weight`, see `PARAMETER_NAMES`.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from esparse_jax.models._ffi_attention import attend, attend_takes
from esparse_jax.models.attention import cached_attention, causal_attention, masked_attention
from esparse_jax.models.cache import KVCache, LayerCache

MODEL_TYPE = "llama"

LAYERS_PATH = "model.layers"

# Linears of a decoder layer in the order of the forward pass; those in one row share their input,
# and so their calibration statistics and their permutation.
PRUNED_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

# The linear whose input channels are the attention heads one by one.
HEADS_LINEAR = "self_attn.o_proj"

# Last element of a state path -> last element of the checkpoint's name. A kernel is
# (channel, out) and the checkpoint's weight (out, channel): `TRANSPOSED` lists what is turned.
PARAMETER_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
TRANSPOSED = frozenset({"kernel"})

# Tensors that old checkpoints carry and that the configuration determines.
DERIVED_TENSORS = (".rotary_emb.inv_freq",)

# With tied embeddings the checkpoint may still carry the head; it is the embedding.
TIED_TENSORS = {"lm_head.weight": "model.embed_tokens.weight"}

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

DTYPES = ("float32", "bfloat16", "float16")

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}

# fmt: off
_ROPE_FIELDS = frozenset({
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate", "short_factor", "long_factor", "partial_rotary_factor",
})

_REQUIRED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# Fields of `config.json` that `LlamaConfig.from_dict` reads.
_READ_FIELDS = frozenset(_REQUIRED_FIELDS) | frozenset({
    "model_type", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
    "hidden_act", "max_position_embeddings", "original_max_position_embeddings", "attention_bias",
    "mlp_bias", "initializer_range", "dtype", "torch_dtype", "bos_token_id", "eos_token_id",
    "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
})

# Fields that leave the logits as they are: what wrote the file, training, and the defaults of
# other programs' generation loops. `pretraining_tp` splits each product into slices that are
# summed again; `attention_dropout` acts in training only.
_HARMLESS_FIELDS = frozenset({
    "_name_or_path", "architectures", "transformers_version", "name_or_path", "use_cache",
    "attention_dropout", "pretraining_tp", "chunk_size_feed_forward", "output_attentions",
    "output_hidden_states", "return_dict", "return_dict_in_generate", "output_scores",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "sep_token_id", "unk_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "num_return_sequences", "exponential_decay_length_penalty", "remove_invalid_values",
    "max_sequence_length", "model_max_length", "_attn_implementation",
    "_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled",
    "unsloth_fixed", "unsloth_version", "resid_pdrop", "embd_pdrop", "gradient_checkpointing",
})
# fmt: on

# Fields that are harmless with these values and change the forward pass with any other.
_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "rope_interleaved": (False,),
    "qk_layernorm": (False,),
    "layer_types": (None,),
    "per_layer_config": (None, {}),
}


def dtype_name(dtype: DTypeLike | None) -> str | None:
    """The name, one of `DTYPES`, of whatever numpy takes for a dtype; None stays None.

    Raises:
        ValueError: No dtype, or one that models are not computed in.
    """
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or None.")
    return name


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles, with everything that other fields imply filled in.

    `original_max_position_embeddings` is the length that the model was first trained for; for
    `dynamic` it is the model's `max_position_embeddings`. `attention_factor` multiplies sine and
    cosine (`yarn` and `longrope` only). Read one from a checkpoint with `from_dict`.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type {self.rope_type!r} is not supported; it must be one of "
                f"{', '.join(ROPE_TYPES)}."
            )
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(
                f"rope_theta and factor must be positive; got {self.theta} and {self.factor}."
            )
        if (
            self.rope_type not in ("default", "linear")
            and self.original_max_position_embeddings < 1
        ):
            raise ValueError(
                f"rope_type {self.rope_type!r} needs original_max_position_embeddings; got "
                f"{self.original_max_position_embeddings}."
            )
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"llama3 rope scaling needs low_freq_factor < high_freq_factor; got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RopeConfig":
        """Reads the rope fields of a `config.json`.

        Old files have `rope_theta` and `rope_scaling` (with `type` or `rope_type`), new ones
        `rope_parameters`; what the inner dictionary does not say is taken from the outer one.

        Source: transformers' `modeling_rope_utils`, standardisation and defaults.
        """
        parameters = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
        nested = sorted(key for key, value in parameters.items() if isinstance(value, Mapping))
        if nested:
            raise ValueError(
                f"rope_parameters gives different rotary settings for {', '.join(nested)}; LLaMA "
                f"has one setting for all layers."
            )
        unknown = sorted(set(parameters) - _ROPE_FIELDS)
        if unknown:
            raise ValueError(
                f"Unknown rope field(s) {', '.join(unknown)}. Known: "
                f"{', '.join(sorted(_ROPE_FIELDS))}. Remove them from config.json if they do not "
                f"change the model's outputs."
            )
        rotated = parameters.get("partial_rotary_factor") or fields.get("partial_rotary_factor")
        if rotated not in (None, 1, 1.0):
            raise ValueError(
                f"partial_rotary_factor is {rotated}; LLaMA rotates the whole head, so only 1.0 is "
                f"supported."
            )
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        missing = [name for name in _ROPE_REQUIRED.get(kind, ()) if parameters.get(name) is None]
        if missing:
            raise ValueError(f"rope_type {kind!r} needs the rope field(s) {', '.join(missing)}.")

        theta = float(parameters.get("rope_theta") or fields.get("rope_theta") or 10000.0)
        longest = fields.get("max_position_embeddings") or 2048
        if kind in ("default", "linear"):
            original = 0
        elif kind == "dynamic":
            original = longest
        else:
            original = (
                fields.get("original_max_position_embeddings")
                or parameters.get("original_max_position_embeddings")
                or longest
            )
        factor = parameters.get("factor") if kind != "default" else 1.0
        factor = float(longest / original if factor is None else factor)
        return cls(
            rope_type=kind,
            theta=theta,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=float(parameters.get("low_freq_factor") or 1.0),
            high_freq_factor=float(parameters.get("high_freq_factor") or 4.0),
            attention_factor=_attention_factor(kind, factor, original, parameters),
            beta_fast=float(parameters.get("beta_fast") or 32.0),
            beta_slow=float(parameters.get("beta_slow") or 1.0),
            truncate=parameters.get("truncate", True) is not False,
            short_factor=tuple(map(float, parameters.get("short_factor") or ())),
            long_factor=tuple(map(float, parameters.get("long_factor") or ())),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields `rope_theta` and `rope_scaling` of a `config.json`."""
        names = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": (*_ROPE_REQUIRED["llama3"], "original_max_position_embeddings"),
            "yarn": (
                *("factor", "original_max_position_embeddings", "attention_factor"),
                *("beta_fast", "beta_slow", "truncate"),
            ),
            "longrope": (
                *("factor", "original_max_position_embeddings", "attention_factor"),
                *("short_factor", "long_factor"),
            ),
        }[self.rope_type]
        scaling: dict[str, Any] = {"rope_type": self.rope_type}
        for name in names:
            value = getattr(self, name)
            scaling[name] = list(value) if isinstance(value, tuple) else value
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.rope_type == "default" else scaling,
        }


def _attention_factor(
    kind: str, factor: float, original: int, parameters: Mapping[str, Any]
) -> float:
    """What sine and cosine are multiplied by: given, or as the scaling's authors advise.

    Source: transformers' `_compute_yarn_parameters` and `_compute_longrope_parameters`.
    """
    if kind not in ("yarn", "longrope"):
        return 1.0
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1.0 + math.log(factor) / math.log(original))

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape and the constants of a LLaMA; hashable, so it can be a static argument.

    Names are those of transformers' `config.json`. `dtype` is the dtype that the checkpoint says
    its weights have. `num_key_value_heads` and `head_dim` follow from the others when None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    dtype: str = "float32"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = (*_REQUIRED_FIELDS, "max_position_embeddings")
        wrong = [name for name in sizes if getattr(self, name) < 1]
        if wrong:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise ValueError(f"Sizes of a LLaMA must be at least 1; got {given}.")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}. Give head_dim, or make it one."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads; got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}; rotary positions turn pairs of features, so it must "
                f"be even."
            )
        for name in ("short_factor", "long_factor"):
            found = len(getattr(self.rope, name))
            if self.rope.rope_type == "longrope" and found != self.head_dim // 2:
                raise ValueError(
                    f"longrope's {name} has {found} numbers; it needs one for each pair of "
                    f"features, {self.head_dim // 2} for head_dim {self.head_dim}."
                )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is not supported; it must be one of "
                f"{', '.join(ACTIVATIONS)}."
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype {self.dtype!r} is not supported; it must be one of {', '.join(DTYPES)}. "
                f"For another, convert the checkpoint first."
            )

    def longest_alike(self, length: int) -> int:
        """How long a sequence may be, in the context, that gives its tokens the angles of `length`.

        `longrope` and `dynamic` have others beyond the length that the model was first trained for.
        """
        original = self.rope.original_max_position_embeddings
        longest = self.max_position_embeddings
        if self.rope.rope_type in ("longrope", "dynamic") and length <= original:
            longest = min(original, longest)
        elif self.rope.rope_type == "dynamic":
            longest = length
        return max(length, longest)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the contents of a `config.json`, old (`rope_theta`, `torch_dtype`) or new.

        Fields that are left out have transformers' defaults, except for the five sizes without
        which a file cannot be meant.

        Raises:
            ValueError: Another model type, a size missing, a field that would change the forward
                pass in a way not built here, or a field that is not known.
        """
        model_type = fields.get("model_type")
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"model_type {model_type!r} is not supported; config.json must say "
                f"model_type {MODEL_TYPE!r}. Other families cannot be loaded."
            )
        if fields.get("quantization_config") is not None:
            raise ValueError(
                "config.json has a quantization_config: the weights are stored in another format. "
                "Start from the checkpoint before quantization, or dequantize it first."
            )
        if "auto_map" in fields:
            raise ValueError(
                f"config.json has auto_map ({fields['auto_map']}): the checkpoint brings its own "
                f"code, which may compute something else. Remove the field if the model is a plain "
                f"LLaMA."
            )
        missing = [name for name in _REQUIRED_FIELDS if fields.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; add what the model has.")
        unknown = [
            f"{name}={value!r}"
            for name, value in sorted(fields.items())
            if name not in _READ_FIELDS
            and name not in _HARMLESS_FIELDS
            and not (name in _HARMLESS_VALUES and value in _HARMLESS_VALUES[name])
        ]
        if unknown:
            raise ValueError(
                f"config.json has fields that LLaMA does not know and that may change its outputs: "
                f"{', '.join(unknown)}. Remove them from config.json if they do not."
            )

        def given(name: str, default: Any) -> Any:
            value = fields.get(name)
            return default if value is None else value

        eos = fields.get("eos_token_id", 2)
        dtype = str(given("dtype", given("torch_dtype", "float32"))).removeprefix("torch.")
        return cls(
            **{name: fields[name] for name in _REQUIRED_FIELDS},
            num_key_value_heads=fields.get("num_key_value_heads"),
            head_dim=fields.get("head_dim"),
            rms_norm_eps=float(given("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_dict(fields),
            tie_word_embeddings=given("tie_word_embeddings", False),
            max_position_embeddings=given("max_position_embeddings", 2048),
            attention_bias=given("attention_bias", False),
            mlp_bias=given("mlp_bias", False),
            hidden_act=given("hidden_act", "silu"),
            initializer_range=float(given("initializer_range", 0.02)),
            dtype=dtype,
            bos_token_id=fields.get("bos_token_id", 1),
            eos_token_id=tuple(eos) if isinstance(eos, (list, tuple)) else eos,
            pad_token_id=fields.get("pad_token_id"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` in the old spelling, which every transformers reads."""
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": MODEL_TYPE,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "torch_dtype": self.dtype,
            **self.rope.to_dict(),
        }
        del fields["rope"], fields["dtype"]
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        return fields


def rope_frequencies(
    rope: RopeConfig, head_dim: int, seq_len: Int[Array, ""] | int | None = None
) -> Float[Array, " pair"] | Float[np.ndarray, " pair"]:
    """The angle that one position turns each pair of features by.

    Computed on the host, each step rounded to float32 as PyTorch rounds it: an error in the last
    bit grows with the position, so the numbers have to be PyTorch's and not merely close.

    Args:
        rope: The rotary settings.
        head_dim: Features of a head, two to a pair.
        seq_len: The greatest position so far plus one; `dynamic` and `longrope` depend on it,
            and `dynamic` is then computed on the device.

    Source: transformers' `modeling_rope_utils`, one branch per function there. `dynamic` there
    remembers the longest sequence that the module ever saw until it sees a short one; here the
    frequencies depend on the given positions alone. In both the longest row of a batch decides for
    all its rows.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # np.float32 powers differ from PyTorch's in the last bit, rounded float64 powers hardly ever.
    wavelength = np.power(rope.theta, exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1.0) / wavelength
    original = rope.original_max_position_embeddings
    match rope.rope_type:
        case "default":
            return frequency
        case "linear":
            return frequency / np.float32(rope.factor)
        case "dynamic":
            if seq_len is None:
                return frequency
            longest = jnp.maximum(seq_len, original).astype(jnp.float32)
            stretch = rope.factor * longest / original - (rope.factor - 1.0)
            theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
            return 1.0 / theta**exponent
        case "llama3":
            period = np.float32(2.0 * math.pi) / frequency
            slowed = np.where(
                period > original / rope.low_freq_factor,
                frequency / np.float32(rope.factor),
                frequency,
            )
            smooth = (original / period - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            between = (1.0 - smooth) * slowed / rope.factor + smooth * slowed
            medium = (period >= original / rope.high_freq_factor) & (
                period <= original / rope.low_freq_factor
            )
            return np.where(medium, between, slowed).astype(np.float32)
        case "yarn":

            def pair_of(rotations: float) -> float:
                # The pair that turns so often within the original length.
                turns = original / (rotations * 2.0 * math.pi)
                return head_dim * math.log(turns) / (2.0 * math.log(rope.theta))

            low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
            if rope.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            if low == high:
                high += 0.001
            ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low)
            kept = np.float32(1.0) - np.clip(ramp, 0.0, 1.0).astype(np.float32)
            slowed = np.float32(1.0) / (np.float32(rope.factor) * wavelength)
            return slowed * (np.float32(1.0) - kept) + frequency * kept
        case "longrope":

            def stretched(factors: tuple[float, ...]) -> np.ndarray:
                return np.float32(1.0) / (np.array(factors, np.float32) * wavelength)

            if seq_len is None:
                return stretched(rope.short_factor)
            return jnp.where(
                jnp.asarray(seq_len) > original,
                stretched(rope.long_factor),
                stretched(rope.short_factor),
            )
    raise AssertionError(f"rope_type {rope.rope_type!r} passed validation")


def rotary_angles(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq 1 pair"], Float[Array, "batch seq 1 pair"]]:
    """Cosine and sine for each position and pair of features, in float32, ready for all heads."""
    frequency = rope_frequencies(rope, head_dim, positions.max() + 1)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None]
    return (
        jnp.cos(angle) * np.float32(rope.attention_factor),
        jnp.sin(angle) * np.float32(rope.attention_factor),
    )


def rotate(
    x: Float[Array, "batch seq head feature"],
    cos: Float[Array, "#batch seq 1 pair"],
    sin: Float[Array, "#batch seq 1 pair"],
) -> Float[Array, "batch seq head feature"]:
    """Turns the pairs (feature i, feature i + half) of each head by their angles, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)


def rotary_attention(
    config: "LlamaConfig",
    query: Float[Array, "batch seq features"],
    key: Float[Array, "batch seq kv_features"],
    value: Float[Array, "batch seq kv_features"],
    positions: Int[Array, "#batch seq"] | None = None,
    *,
    cache: LayerCache | None = None,
    empty: bool = False,
) -> tuple[Float[Array, "batch seq features"], LayerCache | None]:
    """What stands between the projections of an attention, heads side by side in and out.

    Args:
        config: Of the model.
        query, key, value: What the projections gave.
        positions: As for `LlamaDecoderLayer`.
        cache: As for `LlamaDecoderLayer`.
        empty: As for `LlamaForCausalLM.blocks`.
    """
    batch, seq, _ = query.shape
    query, key, value = (x.reshape(batch, seq, -1, config.head_dim) for x in (query, key, value))
    whole = positions is None and (cache is None or (empty and cache.start is None))
    if positions is None:
        positions = (
            jnp.arange(seq, dtype=jnp.int32)[None] if cache is None else cache.positions(seq)
        )
    cos, sin = rotary_angles(config.rope, config.head_dim, positions)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if cache is not None:
        cache = cache.append(key, value)
    if whole:
        attended = causal_attention(query, key, value)
    elif cache is None or empty:
        attended = masked_attention(query, key, value, positions)
    else:
        attended = cached_attention(
            query, cache.keys, cache.values, positions, cache.key_positions()
        )
    return attended.reshape(batch, seq, -1), cache


def attends_in_one_kernel(
    config: "LlamaConfig", projected: Float[Array, "batch projected_feature"], cache: LayerCache
) -> bool:
    """Whether `decode_attention` is one kernel for these, on this machine's GPUs."""
    return projected.dtype == cache.keys.dtype == cache.values.dtype and attend_takes(
        projected.dtype, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )


def decode_attention(
    config: "LlamaConfig",
    projected: Float[Array, "batch projected_feature"],
    cache: LayerCache,
    *,
    places: Int[Array, " feature"] | None = None,
    prefetch: bool = False,
) -> tuple[Float[Array, "batch feature"], LayerCache]:
    """What `rotary_attention` computes for one token a row, from one fused projection.

    On NVIDIA GPUs from compute capability 9.0 on that is one kernel, for 16-bit numbers, heads of
    64 or 128 features, and 1, 2, 4 or 8 query heads to a key. It reads the filled slots alone and
    does not round the weights of the values. Elsewhere it is `rotary_attention`.

    Args:
        config: Of the model.
        projected: Queries, keys and values side by side.
        cache: Written at its next slot.
        places: Where each feature of the result goes, each of them once: the order of channels that
            the product behind reads. None leaves them where they are.
        prefetch: As `in_place` of `CausalLM.blocks`.

    A row all of whose slots are padding yet attends to its token alone, where `rotary_attention`
    gives it the mean of everything. The kernel has no derivative and is not for `vmap`.

    Paper silent: it is about weights. Without this, 7 kernels a layer took a fifth of a step.
    """
    heads, kv_heads, features = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )

    def plain(projected, keys, values, length, start, places):
        query, key, value = jnp.split(
            projected, (heads * features, (heads + kv_heads) * features), axis=1
        )
        attended, written = rotary_attention(
            config,
            *(x[:, None] for x in (query, key, value)),
            cache=LayerCache(keys, values, length, start),
        )
        attended = attended[:, 0]
        if places is not None:
            attended = (
                jnp.zeros_like(attended)
                .at[:, places]
                .set(attended, mode="promise_in_bounds", unique_indices=True)
            )
        return attended, written.keys, written.values

    def kernel(projected, keys, values, length, start, places):
        positions = LayerCache(keys, values, length, start).positions(1)
        angles = rotary_angles(config.rope, features, positions)
        return attend(
            projected, keys, values, *(x.reshape(-1, features // 2) for x in angles), length, start,
            places, heads=heads, prefetch=prefetch,
        )  # fmt: skip

    operands = (projected, cache.keys, cache.values, cache.length, cache.start, places)
    if attends_in_one_kernel(config, projected, cache):
        results = jax.lax.platform_dependent(*operands, cuda=kernel, default=plain)
    else:
        results = plain(*operands)
    attended, keys, values = results
    return attended, LayerCache(keys, values, cache.length + 1, cache.start)


class LlamaAttention(nnx.Module):
    """Attention with rotary positions, for as many key/value heads as the configuration says."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        linear = partial(
            _linear, config, config.attention_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query)
        self.k_proj = linear(config.hidden_size, key)
        self.v_proj = linear(config.hidden_size, key)
        self.o_proj = linear(query, config.hidden_size)
        self.config = config

    def __call__(
        self,
        hidden: Float[Array, "batch seq channel"],
        positions: Int[Array, "#batch seq"] | None = None,
        *,
        cache: LayerCache | None = None,
        empty: bool = False,
    ) -> tuple[Float[Array, "batch seq channel"], LayerCache | None]:
        """See `LlamaDecoderLayer`."""
        projected = (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden))
        attended, cache = rotary_attention(
            self.config, *projected, positions, cache=cache, empty=empty
        )
        return self.o_proj(attended), cache


class LlamaMLP(nnx.Module):
    """The gated two-layer network: down(act(gate(x)) * up(x))."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        linear = partial(
            _linear, config, config.mlp_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.hidden_act = config.hidden_act

    def __call__(
        self, hidden: Float[Array, "batch seq channel"]
    ) -> Float[Array, "batch seq channel"]:
        gate = ACTIVATIONS[self.hidden_act](self.gate_proj(hidden))
        return self.down_proj(gate * self.up_proj(hidden))


class LlamaDecoderLayer(nnx.Module):
    """One block: normalised attention, then a normalised MLP, each added to what it read.

    All blocks of a model have equal graph definitions, so a function jitted for one of them
    (see `surgery.split_layer`) serves them all.
    """

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input_layernorm = _norm(config, **kinds)
        self.self_attn = LlamaAttention(config, **kinds)
        self.post_attention_layernorm = _norm(config, **kinds)
        self.mlp = LlamaMLP(config, **kinds)

    def __call__(
        self,
        hidden: Float[Array, "batch seq channel"],
        positions: Int[Array, "#batch seq"] | None = None,
        *,
        cache: LayerCache | None = None,
        empty: bool = False,
    ) -> Float[Array, "batch seq channel"] | tuple[Float[Array, "batch seq channel"], LayerCache]:
        """The block's output; with a cache, that and the cache one step on.

        Args:
            hidden: The output of the block before, or of `LlamaForCausalLM.embed`.
            positions: Where each token stands in its row, ascending; negative for padding, which
                nobody attends to. None: 0, 1, 2, ..., or where the cache goes on.
            cache: Keys and values of the tokens before. The tokens attend to those and to
                each other.
            empty: As for `LlamaForCausalLM.blocks`.
        """
        attended, cache = self.self_attn(
            self.input_layernorm(hidden), positions, cache=cache, empty=empty
        )
        hidden = hidden + attended
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden if cache is None else (hidden, cache)


class LlamaModel(nnx.Module):
    """Embedding, blocks and last norm; the namespace `model` of the checkpoint."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            **kinds,
        )
        self.layers = nnx.List(
            [LlamaDecoderLayer(config, **kinds) for _ in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config, **kinds)


class CausalLM(nnx.Module):
    """From tokens to logits, around whatever the blocks are.

    Attributes:
        config: The model's configuration.
        dtype: What products are computed in, and what the cache holds.
        model: Has `embed_tokens` and `norm`.
        lm_head: The head; there is none where the configuration ties it to the embedding.
    """

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "#batch seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "batch seq vocab"] | tuple[Float[Array, "batch seq vocab"], KVCache]:
        """Logits for the token after each given one; with a cache, those and the cache.

        Args:
            tokens: Token ids; padding, if any, on the left with any id of the vocabulary.
            positions: As for `LlamaDecoderLayer`; not together with a cache, which knows them.
            cache: From `init_cache` or the step before. The tokens go behind what it holds.
        """
        hidden, cache = self.blocks(self.embed(tokens), positions=positions, cache=cache)
        logits = self.head(hidden)
        return logits if cache is None else (logits, cache)

    def embed(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq channel"]:
        """The hidden states that the first block reads."""
        return self.model.embed_tokens(tokens)

    def blocks(
        self,
        hidden: Float[Array, "batch seq channel"],
        *,
        positions: Int[Array, "#batch seq"] | None = None,
        cache: KVCache | None = None,
        empty: bool = False,
        in_place: bool = False,
    ) -> tuple[Float[Array, "batch seq channel"], KVCache | None]:
        """All blocks, one after the other. `head` of the last token alone is a prefill's logits.

        Args:
            hidden: From `embed`.
            positions: As for `__call__`.
            cache: As for `__call__`.
            empty: The cache comes straight from `init_cache`, so that the tokens attend to each
                other alone, and no slot that is still empty is read.
            in_place: The cache is a donated argument of the `jit`, or carried by a loop, and
                neither computed, copied nor resharded inside: kernels may then read its filled
                slots before the kernel before has ended. Set it for another, and they may read what
                is not written yet.
        """
        if cache is not None and positions is not None:
            raise ValueError(
                "Give positions or a cache, not both: the cache holds each row's start and counts "
                "on from there (init_cache's padding)."
            )
        views = [None] * self.config.num_hidden_layers
        if cache is not None:
            views = [cache.layer(index) for index in range(len(views))]
        hidden, views = self._blocks(hidden, positions, views, empty, in_place)
        if cache is None:
            return hidden, None
        keys, values = tuple(view.keys for view in views), tuple(view.values for view in views)
        return hidden, KVCache(keys, values, cache.length + hidden.shape[1], cache.start)

    def _blocks(
        self,
        hidden: Float[Array, "batch seq channel"],
        positions: Int[Array, "#batch seq"] | None,
        caches: list[LayerCache | None],
        empty: bool,
        in_place: bool,
    ) -> tuple[Float[Array, "batch seq channel"], list[LayerCache | None]]:
        """What the subclasses differ in; a cache for each layer, or None for each."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its blocks run.")

    def head(self, hidden: Float[Array, "batch seq channel"]) -> Float[Array, "batch seq vocab"]:
        """Logits from the last block's output, in float32.

        bfloat16 has eight bits for a logit, which makes exact ties common and greedy decoding
        arbitrary, so the product is accumulated and returned in float32.
        """
        hidden = self.model.norm(hidden)
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        embedding = self.model.embed_tokens.embedding[...].astype(hidden.dtype)
        return jnp.einsum("bsc,vc->bsv", hidden, embedding, preferred_element_type=jnp.float32)


class LlamaForCausalLM(CausalLM):
    """LLaMA with its language modelling head.

    Args:
        config: The model's configuration.
        dtype: What products are computed in; None for `param_dtype`. Norms, rotary positions and
            softmax are computed in float32 whatever it is, and logits are float32.
        param_dtype: What parameters are held in; None for the configuration's.
        rngs: Random numbers for the initial parameters, normal with `config.initializer_range`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        param_dtype = jnp.dtype(config.dtype if param_dtype is None else param_dtype)
        dtype = param_dtype if dtype is None else jnp.dtype(dtype)
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.model = LlamaModel(config, **kinds)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(
                config,
                False,
                config.hidden_size,
                config.vocab_size,
                preferred_element_type=jnp.float32,
                **kinds,
            )
        self.config = config
        self.dtype = dtype

    def _blocks(
        self,
        hidden: Float[Array, "batch seq channel"],
        positions: Int[Array, "#batch seq"] | None,
        caches: list[LayerCache | None],
        empty: bool,
        in_place: bool,
    ) -> tuple[Float[Array, "batch seq channel"], list[LayerCache | None]]:
        del in_place  # XLA's attention reads nothing early
        written = []
        for layer, cache in zip(self.model.layers, caches, strict=True):
            if cache is None:
                hidden = layer(hidden, positions)
            else:
                hidden, cache = layer(hidden, cache=cache, empty=empty)
            written.append(cache)
        return hidden, written


def _linear(
    config: LlamaConfig, use_bias: bool, channels: int, out: int, **kinds: Any
) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(channels, out, use_bias=use_bias, kernel_init=init, **kinds)


def _norm(config: LlamaConfig, **kinds: Any) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **kinds)
