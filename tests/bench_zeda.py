"""What skipped slots are worth in time: python -m tests.bench_zeda [--experts 64 --top-k 8 --hidden 256]

A mixture (D 512, 4 layers; by default 16 experts of F 1024, 4 a token: nine tenths of the FLOPs are theirs) and its
ZEDA form with half of the slots on zero experts, random weights, the share set by the zero experts' selection bias.
One engine each, the same prompts, by turns; medians and the range of the rounds' own ratios:

    slots      share of slots skipped, counted in the routing record: the expert FLOPs saved
    experts    the expert layer alone on that record, time / teacher's
    prefill    tokens per second of prefill, student / teacher
    decode     tokens per second of decoding `--sequences` side by side, student / teacher
    together   generated tokens per second of prefill and decoding together, student / teacher

What decoding gains depends on the rows that an expert receives in a step, sequences x top_k / experts: a product of few
rows costs about what reading its matrix does, whether half of the rows are gone or not.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe import params as parameters
from moe.experts import experts
from moe.layers.moe import MoEParams
from moe.models.decode import Engine, EngineConfig
from moe.models.hf import config_from_hf
from moe.models.sampling import Sampling
from moe.models.transformer import TransformerParams, apply, transformer_specs
from moe.zeda import convert, zero_ratio


def _biased(student: TransformerParams, experts: int, value: float) -> TransformerParams:
    def change(run: Any) -> Any:
        mixture: MoEParams = run.mlp
        assert mixture.router_bias is not None
        bias = jnp.asarray(mixture.router_bias).at[:, experts:].set(value)
        return dataclasses.replace(run, mlp=dataclasses.replace(mixture, router_bias=bias))

    return dataclasses.replace(student, runs=tuple(map(change, student.runs)))


def _half(student: TransformerParams, cfg: Any) -> TransformerParams:
    """The zero experts' bias at which half of the slots are theirs, by bisection on random tokens."""
    tokens = jax.random.randint(jax.random.key(7), (8, 64), 0, cfg.vocab)
    top_k, real = cfg.moe.routing.top_k, cfg.moe.routing.experts

    @jax.jit
    def share(p: TransformerParams) -> jax.Array:
        return zero_ratio(apply(p, tokens, cfg=cfg).routing.reshape(cfg.mixtures, -1, top_k), real).mean()

    low, high = -0.1, 0.1
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if float(share(_biased(student, real, middle))) < 0.5 else (low, middle)
    return _biased(student, real, low)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024, help="F")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--new", type=int, default=32, help="tokens decoded a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    real, top_k = options.experts, options.top_k
    cfg = config_from_hf(
        dict(
            model_type="qwen3_moe", vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=real, num_experts_per_tok=top_k,
            moe_intermediate_size=options.hidden, norm_topk_prob=True, rope_theta=1e6, tie_word_embeddings=True,
            eos_token_id=None, bos_token_id=None,
        )
    )  # fmt: skip
    teacher = parameters.init(jax.random.key(0), transformer_specs(cfg))
    student, scfg = convert(teacher, cfg, zero_experts=real // 2, key=jax.random.key(1), selection_bias=True)
    student = _half(student, scfg)
    size = EngineConfig(
        sequences=options.sequences, length=64 + options.new, batches=(options.sequences,), prefill_tokens=2048,
        record_routing=True, share_prefixes=False, steps=4,
    )  # fmt: skip
    engines = {"teacher": Engine(teacher, cfg, size), "student": Engine(student, scfg, size)}
    prompts = [np.random.default_rng(n).integers(0, cfg.vocab, 48) for n in range(options.sequences)]
    wanted = Sampling(temperature=1.0, max_tokens=options.new, ignore_eos=True)
    rates: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": [], "together": []} for name in engines}
    skipped = 0.0
    for round_ in range(options.rounds + 1):
        for name, engine in engines.items():
            engine.reset_metrics()
            done = engine.generate(prompts, wanted, seed=round_)
            if round_:  # the first compiles
                rates[name]["prefill"].append(engine.metrics.prefill_rate)
                rates[name]["decode"].append(engine.metrics.decode_rate)
                spent = engine.metrics.prefill_seconds + engine.metrics.decode_seconds
                rates[name]["together"].append(engine.metrics.generated / spent)
            if name == "student":
                skipped = float(np.mean([(one.routing >= real).mean() for one in done if one.routing is not None]))
    print(
        f"{parameters.count(teacher):,} parameters, {real} experts, {top_k} a token, F {options.hidden}; "
        f"{options.sequences} sequences ({options.sequences * top_k // real} rows an expert), float32, "
        f"{options.rounds} rounds"
    )
    print(f"slots    {skipped:.3f} skipped")
    for what in ("prefill", "decode", "together"):
        before, after = rates["teacher"][what], rates["student"][what]
        each = np.asarray(after) / np.asarray(before)
        print(
            f"{what:8s} {statistics.median(after):8.0f} / {statistics.median(before):.0f} tokens/s = "
            f"{statistics.median(after) / statistics.median(before):.2f} [{each.min():.2f}-{each.max():.2f}]"
        )
    mixture = jax.tree.map(lambda leaf: leaf[0], teacher.runs[0].mlp.experts)
    x = jax.random.normal(jax.random.key(3), (4096, 512))
    weights = jnp.full((4096, top_k), 1 / top_k)
    run = jax.jit(experts)
    rng = np.random.default_rng(0)
    full = np.argsort(rng.random((4096, real)), 1)[:, :top_k]
    index = {"teacher": full, "student": np.where(rng.random(full.shape) < skipped, real, full)}
    taken: dict[str, list[float]] = {name: [] for name in index}
    for round_ in range(options.rounds + 1):
        for name, slots in index.items():
            slots = jnp.asarray(slots, jnp.int32)
            began = time.perf_counter()
            jax.block_until_ready(run(mixture, x, slots, weights))
            if round_:
                taken[name].append(time.perf_counter() - began)
    each = np.asarray(taken["student"]) / np.asarray(taken["teacher"])
    ratio = statistics.median(taken["student"]) / statistics.median(taken["teacher"])
    print(f"experts  {ratio:.2f} [{each.min():.2f}-{each.max():.2f}] of the teacher's time, 4,096 tokens")


if __name__ == "__main__":
    main()
