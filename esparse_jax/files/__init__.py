"""Reading and writing models and data: the only room that does."""

from esparse_jax.files.checkpoint import (
    compressed_layers,
    load_inference_model,
    load_model,
    load_tokenizer,
    save_model,
)
from esparse_jax.files.convert import Conversion, compress_checkpoint, expand_checkpoint
from esparse_jax.files.data import (
    calibration_windows,
    evaluation_windows,
    read_prompts,
    read_text_tokens,
    window_length,
)
from esparse_jax.files.directory import (
    check_output,
    read_esparse,
    read_permutations,
    write_json,
)
from esparse_jax.files.interop import flax_params_from_model, model_from_flax_params
from esparse_jax.files.verify import VerifyResult, Violation, verify_checkpoint

__all__ = [
    "Conversion",
    "VerifyResult",
    "Violation",
    "calibration_windows",
    "check_output",
    "compress_checkpoint",
    "compressed_layers",
    "evaluation_windows",
    "expand_checkpoint",
    "flax_params_from_model",
    "load_inference_model",
    "load_model",
    "load_tokenizer",
    "model_from_flax_params",
    "read_esparse",
    "read_permutations",
    "read_prompts",
    "read_text_tokens",
    "save_model",
    "verify_checkpoint",
    "window_length",
    "write_json",
]
