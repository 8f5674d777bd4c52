"""The form `torch` of `esparse bench`: transformers' LLaMA. The only file here that needs torch."""

import statistics
import time
from typing import Any

import jax

from esparse_jax.inference.bench import (
    BenchOptions,
    BenchResult,
    cache_bytes_read,
    dtype_of,
    prompt_tokens,
)


def measure_torch(options: BenchOptions) -> BenchResult:
    """Times transformers' model of the same shape with random weights, greedy, a static cache.

    On CUDA a decode step is compiled, with CUDA graphs (`mode="reduce-overhead"`), as transformers'
    own `generate` does it; elsewhere it runs as it is. Where JAX is told to do without CUDA
    (JAX_PLATFORMS), torch does without it too.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
    """
    import torch
    import transformers

    allowed = jax.config.jax_platforms or "cuda"
    cuda = torch.cuda.is_available() and ("cuda" in allowed or "gpu" in allowed)
    # JAX makes the tokens alone, and leaves the GPU's memory to torch.
    jax.config.update("jax_platforms", "cpu")
    config, dtype = options.config(), dtype_of(options, on_cpu=not cuda)
    settings = transformers.LlamaConfig(**config.to_dict())
    settings._attn_implementation = "sdpa"
    with torch.device("cuda" if cuda else "cpu"), torch.no_grad():
        model = transformers.LlamaForCausalLM._from_config(settings, dtype=getattr(torch, dtype))
        model.eval()
        tokens = torch.tensor(jax.device_get(prompt_tokens(options)).tolist())
        step = torch.compile(model.forward, mode="reduce-overhead") if cuda else model.forward
        resident = torch.cuda.memory_allocated() if cuda else None
        made_peak = torch.cuda.max_memory_allocated() if cuda else None
        cache = transformers.StaticCache(config=settings, max_cache_len=options.slots)

        def wait() -> None:
            if cuda:
                torch.cuda.synchronize()

        def read() -> tuple[Any, float]:
            wait()
            started = time.perf_counter()
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            token.cpu()
            return token, time.perf_counter() - started

        firsts, steps = [], []
        for repeat in range(options.repeats + 2):  # the first compiles, the second records
            cache.reset()
            token, seconds = read()
            if repeat > 1:
                firsts.append(seconds)
            if options.stage == "prefill":
                continue
            wait()
            started = time.perf_counter()
            for _ in range(options.steps):
                if cuda:  # the replay before may be written over
                    torch.compiler.cudagraph_mark_step_begin()
                logits = step(token, past_key_values=cache).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
            token.cpu()
            if repeat > 1:
                steps.append((time.perf_counter() - started) / options.steps)
        weights = {name: weight.nbytes for name, weight in model.named_parameters()}
        peak = torch.cuda.max_memory_allocated() if cuda else None
    read_bytes = sum(weights.values())
    if not config.tie_word_embeddings:
        read_bytes -= weights["model.embed_tokens.weight"]
    return BenchResult(
        form="torch",
        device=torch.cuda.get_device_name() if cuda else "cpu",
        dtype=dtype,
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        first_token=statistics.median(firsts),
        step=statistics.median(steps) if steps else None,
        model_bytes=sum(weights.values()),
        resident_bytes=resident,
        peak_bytes=peak,
        made_peak_bytes=made_peak,
        linear_bytes=sum(size for name, size in weights.items() if "_proj." in name),
        weight_bytes=read_bytes,
        cache_bytes=cache_bytes_read(options, dtype),
        times=tuple(steps or firsts),
    )
