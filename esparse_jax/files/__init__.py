"""Reading and writing models and data: the only room that does."""

from esparse_jax.files.checkpoint import (
    check_output,
    load_model,
    load_tokenizer,
    read_esparse,
    read_permutations,
    save_model,
    write_json,
)
from esparse_jax.files.data import calibration_windows, evaluation_windows, read_text_tokens
from esparse_jax.files.interop import flax_params_from_model, model_from_flax_params
from esparse_jax.files.verify import VerifyResult, Violation, verify_checkpoint

__all__ = [
    "VerifyResult",
    "Violation",
    "calibration_windows",
    "check_output",
    "evaluation_windows",
    "flax_params_from_model",
    "load_model",
    "load_tokenizer",
    "model_from_flax_params",
    "read_esparse",
    "read_permutations",
    "read_text_tokens",
    "save_model",
    "verify_checkpoint",
    "write_json",
]
