"""Decoding, measured: python -m tests.bench_decode [--layers 6 --width 512]

Side by side in one process, medians of interleaved runs:

    floor       reading every weight of the model once, by a dot of each with a vector: the least that a decode step of
                few sequences can cost
    step        one decode step of `--sequences` sequences at a context of `--context` tokens, greedy; layers unstacked
                and scanned, cache pool of 1x and 16x the size (equal if the cache is updated in place)
    continuous  requests of mixed lengths through the engine, against batches that wait for their longest
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe import params as parameters
from moe.models.decode import Engine, EngineConfig
from moe.models.hf import config_from_hf
from moe.models.sampling import Sampling
from moe.models.transformer import transformer_specs
from tests.benchmarks.timing import interleave, seconds


@jax.jit
def _stream(params):
    """Reads every weight once."""
    return [jnp.einsum("ij->i", leaf.reshape(-1, leaf.shape[-1])).sum() for leaf in jax.tree.leaves(params)]


def _filled(params, cfg, sequences: int, context: int, **changes) -> Engine:
    """An engine whose sequences all decode at this context."""
    length = 2 * context
    sizes = EngineConfig(
        sequences=sequences, length=length, batches=(sequences,), widths=(length // 16,),
        **{"pages": sequences * length // 16} | changes,
    )  # fmt: skip
    engine = Engine(params, cfg, sizes)
    for number in range(sequences):
        engine.submit(np.random.default_rng(number).integers(0, cfg.vocab, context), Sampling(temperature=0))
    for _ in range(3 * sequences):
        engine.step()
    return engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--experts", type=int, default=0, help="0: a dense model")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    mixture = dict(
        model_type="qwen3_moe", num_experts=options.experts, num_experts_per_tok=min(8, options.experts),
        moe_intermediate_size=options.width // 2, norm_topk_prob=True, head_dim=64,
    )  # fmt: skip
    cfg = config_from_hf(
        dict(
            vocab_size=options.vocab, hidden_size=options.width, intermediate_size=4 * options.width,
            num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
            num_key_value_heads=max(1, options.width // 256), rope_theta=1e6, tie_word_embeddings=True,
            eos_token_id=None, bos_token_id=None,
        )
        | (mixture if options.experts else dict(model_type="llama"))
    )  # fmt: skip
    params = parameters.init(jax.random.key(0), transformer_specs(cfg))
    size = parameters.nbytes(params)
    print(f"{jax.devices()[0].device_kind}: {parameters.count(params):,} parameters, {size / 1e6:.0f} MB, float32")

    pool = options.sequences * 2 * options.context // 16
    engines = {
        "unstacked": _filled(params, cfg, options.sequences, options.context, unstack=True),
        "scanned": _filled(params, cfg, options.sequences, options.context, unstack=False),
        "unstacked, pool x16": _filled(params, cfg, options.sequences, options.context, unstack=True, pages=16 * pool),
    }
    split = engines["unstacked"]._params
    runs: dict[str, Callable[[], object]] = {"floor": lambda: _stream(split)}
    runs |= {name: engine.step for name, engine in engines.items()}
    timed = {name: functools.partial(seconds, run) for name, run in runs.items()}
    taken = interleave(timed, options.repeats)
    floor = statistics.median(taken["floor"])
    for name, each in taken.items():
        median, low, high = statistics.median(each), min(each), max(each)
        rate = "" if name == "floor" else f", {options.sequences / median:.0f} tokens/s"
        print(
            f"{name:22s} {1e3 * median:8.2f} ms [{1e3 * low:.2f}, {1e3 * high:.2f}]  {median / floor:5.2f} x floor, "
            f"{size / median / 1e9:.1f} GB/s{rate}"
        )

    engine = engines["unstacked"]
    print(f"{'prefill':22s} {engine.metrics.prefill_rate:8.0f} tokens/s, first calls and their compilation included")
    _continuous(params, cfg, options.sequences)


def _continuous(params, cfg, rows: int) -> None:
    """Completion lengths drawn from an exponential of mean 24, cut at 96: a few long ones, as reasoning has."""
    lengths = np.clip(np.random.default_rng(0).exponential(24, 8 * rows), 2, 96).astype(int).tolist()
    prompts = [np.random.default_rng(n).integers(0, cfg.vocab, 16) for n in range(len(lengths))]
    each = [Sampling(temperature=1.0, max_tokens=length) for length in lengths]
    sizes = EngineConfig(sequences=rows, length=128, batches=(rows,), widths=(8,), share_prefixes=False)
    engine = Engine(params, cfg, sizes)
    engine.generate(prompts[: 2 * rows], each[: 2 * rows])  # compiles
    rates: dict[str, list[float]] = {"continuous": [], "static": []}
    for _ in range(3):
        engine.reset_metrics()
        rates["continuous"].append(sum(lengths) / seconds(lambda: engine.generate(prompts, each) and None))
        used = engine.metrics.utilisation
        engine.reset_metrics()
        started = time.perf_counter()
        for first in range(0, len(prompts), rows):
            engine.generate(prompts[first : first + rows], each[first : first + rows])
        rates["static"].append(sum(lengths) / (time.perf_counter() - started))
        waiting = engine.metrics.utilisation
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"continuous batching {medians['continuous']:.0f} tokens/s ({used:.0%} of the rows used), static batches "
        f"{medians['static']:.0f} ({waiting:.0%}): {medians['continuous'] / medians['static']:.2f} x"
    )


if __name__ == "__main__":
    main()
