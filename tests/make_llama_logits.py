"""Writes `data/llama_logits.npz`: what PyTorch computes for the models of `llama_cases`.

    python tests/make_llama_logits.py

For each case and length, `<case>/<length>/float64` holds the logits of the last tokens computed in
float64, and `<case>/<length>/error` how far PyTorch's float32 logits are from them, the greatest
difference over all tokens. The committed file was written with torch 2.13.0, transformers 5.23.0.
"""

import llama_cases
import numpy as np
import torch
from torch_llama import torch_llama


def torch_logits(case: str, length: int, dtype: torch.dtype) -> np.ndarray:
    fields = llama_cases.CASES[case]
    model = torch_llama(fields, llama_cases.weights(fields), dtype)
    return model(torch.tensor(llama_cases.tokens(case, length)).long()).logits.numpy()


def main() -> None:
    arrays = {}
    for case, length in llama_cases.RUNS:
        truth = torch_logits(case, length, torch.float64)
        error = np.abs(torch_logits(case, length, torch.float32) - truth).max()
        arrays[f"{case}/{length}/float64"] = truth[:, -llama_cases.STORED :]
        arrays[f"{case}/{length}/error"] = error
        ours = np.abs(llama_cases.our_logits(case, length) - truth).max()
        print(
            f"{case:12} {length:3} torch {error:.3e} ours {ours:.3e} of {np.abs(truth).max():.3f}"
        )
    np.savez_compressed(llama_cases.LOGITS, **arrays)


if __name__ == "__main__":
    main()
