"""The decoding engine: log-probabilities and routing against the training forward, batching without consequence,
pages, preemption, stops, weights that change, damaged weights, a mesh.
"""

# A field that is None where a test reads it fails the test, which is all that pyright could add.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import params as parameters
from moe.models import decode
from moe.models.decode import DecodeError, Engine, EngineConfig, NonFiniteLogits, PromptError, generate
from moe.models.hf import config_from_hf
from moe.models.pages import ROOT, PagePool
from moe.models.sampling import Sampling
from moe.models.transformer import apply, forward, logits, transformer_specs
from moe.sharding import FSDP_TP_EP, make_mesh, use_mesh

VOCAB = 62
_SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, rope_theta=1e4)
CONFIGS = {
    "qwen3_moe": _SMALL
    | dict(
        model_type="qwen3_moe", num_hidden_layers=2, num_key_value_heads=2, head_dim=8, num_experts=8,
        num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True, eos_token_id=60,
    ),
    # Latent attention; experts and slots without parameters.
    "longcat_flash": dict(
        model_type="longcat_flash", vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_layers=1,
        ffn_hidden_size=48, kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        n_routed_experts=6, zero_expert_num=3, expert_ffn_hidden_size=16, moe_topk=3, rope_theta=1e4,
        bos_token_id=None, eos_token_id=None,
    ),
}  # fmt: skip
# One batch size, one width and two prefill lengths: few shapes to compile.
SIZES = EngineConfig(
    sequences=4, length=40, page_size=4, batches=(4,), widths=(10,), prefill_tokens=8, record_routing=True
)
# One prefill length only, where another size of the engine compiles everything anew.
FEW = dataclasses.replace(SIZES, prefill_tokens=4)
PROMPTS = [np.random.default_rng(7).integers(0, VOCAB - 2, n).tolist() for n in (1, 5, 8, 9, 19, 2, 13)]


def _model(family: str):
    cfg = config_from_hf(CONFIGS[family])
    params = parameters.init(jax.random.key(0), transformer_specs(cfg))
    # Logits with a spread of about 2: draws that are neither certain nor uniform.
    return cfg, params.replace(head=params.head * 15)


@pytest.fixture(scope="module")
def model():
    return _model("qwen3_moe")


def _tokens(completions):
    return [c.tokens.tolist() for c in completions]


def _training(params, cfg, completion, replay=False):
    """(log-probability of every generated token, routing of all tokens fed) by the training forward."""
    tokens = np.concatenate([completion.prompt, completion.tokens])[None]
    fed = np.zeros((1, SIZES.length), np.int32)  # one shape; later tokens change nothing in a causal model
    fed[:, : tokens.shape[1] - 1] = tokens[:, :-1]
    index = None
    if replay:
        record = completion.routing[:, None]
        padding = ((0, 0), (0, 0), (0, SIZES.length - record.shape[2]), (0, 0))
        index = np.pad(record, padding, constant_values=cfg.moe.routing.slots)
    out = _apply(params, fed, index, cfg=cfg)
    logprobs = np.asarray(jax.nn.log_softmax(logits(params, out.hidden)[0], -1))
    first, count = len(completion.prompt) - 1, len(completion.tokens)
    own = logprobs[np.arange(first, first + count), completion.tokens]
    return own, np.asarray(out.routing[:, 0, : first + count]), logprobs[first : first + count]


@jax.jit(static_argnames="cfg")
def _apply(params, tokens, replay, *, cfg):
    return apply(params, tokens, cfg=cfg, replay=replay)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "qwen3_moe" else pytest.mark.slow) for f in CONFIGS]
)
def test_logprobs_and_routing_are_those_of_the_training_forward(family):
    cfg, params = _model(family)
    sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=9, n=2, top_logprobs=3)
    sizes = SIZES if family == "qwen3_moe" else FEW
    completions = generate(params, cfg, PROMPTS, sampling, seed=3, config=sizes)
    assert [(c.request, c.sample) for c in completions] == [(i, s) for i in range(len(PROMPTS)) for s in range(2)]
    assert len(set(map(tuple, _tokens(completions)))) == len(completions)  # samples differ
    for c in completions:
        own, routing, every = _training(params, cfg, c)
        np.testing.assert_allclose(c.logprobs, own, atol=1e-5)
        np.testing.assert_array_equal(c.routing, routing)
        np.testing.assert_allclose(_training(params, cfg, c, replay=True)[0], c.logprobs, atol=1e-5)
        ids, values = c.top
        np.testing.assert_array_equal(ids, np.argsort(-every, -1)[:, :3])
        np.testing.assert_allclose(values, -np.sort(-every, -1)[:, :3], atol=1e-5)
        assert (c.sampling_logprobs <= 0).all()
        assert not np.allclose(c.sampling_logprobs, c.logprobs)
    slots = np.unique(np.concatenate([c.routing.reshape(-1) for c in completions]))
    assert slots.max() < cfg.moe.routing.slots
    assert family == "qwen3_moe" or slots.max() >= cfg.moe.routing.experts  # free slots are in the record


def test_greedy_follows_the_forward_without_a_cache(model):
    cfg, params = model
    sampling = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
    completions = generate(params, cfg, PROMPTS, sampling, config=SIZES)
    full = jax.jit(lambda tokens: forward(params, tokens, cfg=cfg))
    for prompt, c in zip(PROMPTS, completions, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            padded = np.zeros((1, SIZES.length), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(full(padded)[0, len(tokens) - 1].argmax()))
        assert tokens[len(prompt) :] == c.tokens.tolist()
        assert (c.finish, c.sampling_logprobs.tolist()) == ("length", [0.0] * 8)


SAMPLED = Sampling(temperature=0.9, top_k=30, max_tokens=10)


@pytest.fixture(scope="module")
def sampled(model):
    """Completions of PROMPTS; what other ways of computing them must give again."""
    cfg, params = model
    return generate(params, cfg, PROMPTS, SAMPLED, seed=11, config=SIZES)


def _same(completions, expected):
    assert _tokens(completions) == _tokens(expected)
    for ours, theirs in zip(completions, expected, strict=True):
        assert (ours.finish, ours.stop) == (theirs.finish, theirs.stop)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        if ours.routing is not None:
            np.testing.assert_array_equal(ours.routing, theirs.routing)


def test_a_request_draws_the_same_tokens_whatever_runs_beside_it(model, sampled):
    cfg, params = model
    engine = Engine(params, cfg, SIZES)
    for number in (4, 1):
        engine.submit(PROMPTS[number], SAMPLED, seed=11, key=number)
        alone = []
        while engine.busy:
            alone += [event.completion for event in engine.step() if event.completion]
        _same(alone, [sampled[number]])
    done = {}
    for number in (6, 2, 4, 3, 1, 0, 5):  # another order, among strangers of another seed
        engine.submit(PROMPTS[number], dataclasses.replace(SAMPLED, temperature=1.5), seed=5)
        done[engine.submit(PROMPTS[number], SAMPLED, seed=11, key=number)] = number
    while engine.busy:
        for event in engine.step():
            if event.completion and event.request in done:
                _same([event.completion], [sampled[done[event.request]]])
    assert _tokens(engine.generate(PROMPTS, SAMPLED, seed=12)) != _tokens(sampled)


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=3),
        dict(unstack=False),
        pytest.param(dict(batches=(1, 4), widths=(5, 10), record_routing=False), marks=pytest.mark.slow),
        dict(share_prefixes=False, sequences=2, batches=(2,)),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_sizes_of_the_engine_change_nothing(model, sampled, changes):
    cfg, params = model
    _same(generate(params, cfg, PROMPTS, SAMPLED, seed=11, config=dataclasses.replace(FEW, **changes)), sampled)


def test_preempted_sequences_go_on_as_if_nothing_had_happened(model):
    cfg, params = model
    long = dataclasses.replace(SAMPLED, max_tokens=24, ignore_eos=True)
    ample = generate(params, cfg, PROMPTS, long, seed=2, config=SIZES)
    engine = Engine(params, cfg, dataclasses.replace(FEW, pages=15))
    _same(engine.generate(PROMPTS, long, seed=2), ample)
    assert engine.metrics.preemptions > 0
    assert engine.metrics.peak_pages <= 15
    assert engine._pool.used == 0
    for c in ample:
        np.testing.assert_allclose(_training(params, cfg, c)[0], c.logprobs, atol=1e-5)


def test_samples_of_a_prompt_hold_its_full_pages_together(model):
    cfg, params = model
    prompt, sampling = PROMPTS[4], dataclasses.replace(SAMPLED, n=4, max_tokens=2, ignore_eos=True)
    shared, own = (Engine(params, cfg, dataclasses.replace(SIZES, share_prefixes=share)) for share in (True, False))
    _same(shared.generate([prompt], sampling), own.generate([prompt], sampling))
    # 18 prompt tokens are prefilled, 16 of them in 4 full pages.
    assert (shared.metrics.prefilled, shared.metrics.shared) == (18 + 3 * 2, 3 * 16)
    assert (own.metrics.prefilled, own.metrics.shared) == (4 * 18, 0)
    # 20 tokens are fed in all, in 5 pages.
    assert (shared.metrics.peak_pages, own.metrics.peak_pages) == (4 + 4 * 1, 4 * 5)
    assert shared._pool.used == own._pool.used == 0
    shared.generate([[*prompt, 1, 2]], dataclasses.replace(sampling, n=1))  # a later request finds them too
    assert shared.metrics.shared == 4 * 16


def test_new_weights_take_effect_without_compiling(model, sampled):
    cfg, params = model
    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    expected = generate(other, cfg, PROMPTS, SAMPLED, seed=11, config=SIZES)
    assert _tokens(expected) != _tokens(sampled)
    engine = Engine(params, cfg, SIZES)
    _same(engine.generate(PROMPTS, SAMPLED, seed=11), sampled)
    compiled = decode._decode._cache_size(), decode._prefill._cache_size()
    engine.update(other)
    _same(engine.generate(PROMPTS, SAMPLED, seed=11), expected)
    assert (decode._decode._cache_size(), decode._prefill._cache_size()) == compiled

    # In the middle of a sequence: from there on its tokens are those of the new weights.
    engine.submit(PROMPTS[2], dataclasses.replace(SAMPLED, ignore_eos=True))
    events = [event for _ in range(4) for event in engine.step()]
    engine.update(params)
    while engine.busy:
        events += engine.step()
    (c,) = [event.completion for event in events if event.completion]
    assert c.versions.tolist() == [1] * 4 + [2] * 6
    np.testing.assert_allclose(c.logprobs[:4], _training(other, cfg, c)[0][:4], atol=1e-5)
    np.testing.assert_allclose(c.logprobs[4:], _training(params, cfg, c, replay=True)[0][4:], atol=1e-5)
    with pytest.raises(DecodeError, match=r"parameter 'norm' has dtype bfloat16"):
        engine.update(params.replace(norm=params.norm.astype(jnp.bfloat16)))
    with pytest.raises(DecodeError, match="another structure"):
        engine.update(params.replace(head=None))


class _Letters:
    """Tokens 0 to 25 are letters, the others pieces of two bytes each of a character, or nothing."""

    stop_ids = (59,)

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def stream(self, *, skip_special_tokens):
        return _LetterStream()


class _LetterStream:
    def __init__(self):
        self.half = False

    def push(self, token):
        if token < 26:
            return chr(ord("a") + token)
        self.half = not self.half
        return "" if self.half else "é"

    def finish(self):
        return "\ufffd" if self.half else ""


def _spell(tokens):
    stream = _LetterStream()
    return "".join(stream.push(token) for token in tokens) + stream.finish()


def test_stops_end_a_sequence_and_its_text(model):
    cfg, params = model
    engine = Engine(params, cfg, SIZES, tokenizer=_Letters())
    plain = Sampling(temperature=1.0, max_tokens=20, ignore_eos=True)
    (whole,) = engine.generate(["abc"], plain, seed=4)
    assert (whole.finish, len(whole.tokens), whole.text) == ("length", 20, _spell(whole.tokens))
    tokens, text = whole.tokens.tolist(), whole.text

    token = tokens[8]
    (c,) = engine.generate(["abc"], dataclasses.replace(plain, stop_ids=(token,)), seed=4)
    end = tokens.index(token)
    assert (c.finish, c.stop, c.tokens.tolist()) == ("stop", token, tokens[: end + 1])
    assert c.text == _spell(tokens[:end])
    (c,) = engine.generate(["abc"], dataclasses.replace(plain, ignore_eos=False), seed=4)
    own = next((i for i, t in enumerate(tokens) if t in (59, 60)), None)
    assert c.finish == ("length" if own is None else "stop")

    stop = text[5:8]
    at = text.index(stop)
    for steps in (1, 3):
        engine = Engine(params, cfg, dataclasses.replace(SIZES, steps=steps), tokenizer=_Letters())
        events = list(engine.stream("abc", dataclasses.replace(plain, stop=("zzzz", stop)), seed=4, key=0))
        c = events[-1].completion
        assert (c.finish, c.stop, c.text) == ("stop", stop, text[:at])
        assert "".join(event.text for event in events) == c.text
        assert [token for event in events for token in event.tokens] == c.tokens.tolist()
        assert [value for event in events for value in event.logprobs] == c.logprobs.tolist()
        shortest = next(n for n in range(21) if stop in _spell(tokens[:n]))
        assert c.tokens.tolist() == tokens[:shortest]  # later ones of the same call are thrown away
        assert c.routing.shape[1] == 3 + shortest - 1


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_text_is_cut_at_the_first_stop_and_never_taken_back(letters, stops):
    text = decode._Text(_LetterStream(), tuple(stops))
    shown, found = [], None
    for letter in letters:
        piece, found = text.push(ord(letter) - ord("a"))
        shown.append(piece)
        if found:
            break
    else:
        piece, found = text.finish()
        shown.append(piece)
    whole = "".join(letters)
    ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
    assert bool(found) == bool(ends)
    if found:
        seen = whole[: min(ends)]  # the token that completes the first stop ends it
        assert "".join(shown) == seen[: min(seen.index(stop) for stop in stops if stop in seen)]
    else:
        assert "".join(shown) == whole
    assert text.whole() == "".join(shown)


def test_sequences_end_where_the_engine_is_full(model):
    cfg, params = model
    (c,) = generate(params, cfg, [PROMPTS[4]], Sampling(ignore_eos=True), config=SIZES)
    assert (c.finish, len(c.prompt) + len(c.tokens)) == ("length", SIZES.length)
    assert c.routing.shape[1] == SIZES.length - 1


def test_cancelled_requests_give_their_pages_back(model, sampled):
    cfg, params = model
    engine = Engine(params, cfg, SIZES)
    numbers = [engine.submit(prompt, Sampling(n=2, ignore_eos=True)) for prompt in PROMPTS]
    engine.step()
    engine.step()
    assert engine.pending == 14
    assert all(engine.cancel(number) for number in numbers)
    assert (engine.pending, engine._pool.used) == (0, 0)
    done = [event.completion for event in engine.step()]
    assert [c.finish for c in done] == ["cancelled"] * 14
    assert max(len(c.tokens) for c in done) > 0
    assert not engine.cancel(numbers[0])
    stream = engine.stream(PROMPTS[0], Sampling(ignore_eos=True))
    next(stream)
    stream.close()
    assert engine.pending == 0
    engine.step()
    _same(engine.generate(PROMPTS, SAMPLED, seed=11), sampled)


def test_one_broken_token_fails_alone_and_leaves_clean_pages(model):
    """A NaN in the embedding of token 60: whoever reads it fails, the others do not, nor whoever gets its pages."""
    cfg, params = model
    sampling = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    clean = generate(params, cfg, PROMPTS, sampling, config=SIZES)
    broken = params.replace(embed=params.embed.at[60].set(jnp.nan))
    engine = Engine(broken, cfg, dataclasses.replace(FEW, pages=15))
    bad = engine.submit([1, 2, 3, 60, 5, 6, 7, 8, 9], sampling)
    done = {}
    for prompt in PROMPTS:
        engine.submit(prompt, sampling)
    while engine.busy:
        done |= {event.request: event.completion for event in engine.step() if event.completion}
    failed = done.pop(bad)
    assert failed.finish == "error"
    assert isinstance(failed.error, NonFiniteLogits)
    assert re.search(r"after position 8 of request 0 \(sample 0\)", str(failed.error))
    assert _tokens(done[number] for number in sorted(done)) == _tokens(clean)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(engine._cache_rows))
    with pytest.raises(NonFiniteLogits):
        engine.generate([[1, 2], [60]], sampling)
    assert (engine.pending, engine._pool.used) == (0, 0)


def test_steps_update_the_cache_in_place(model):
    cfg, params = model
    for steps, split in ((1, True), (3, False)):
        sizes = dataclasses.replace(SIZES, steps=steps, pages=4000, unstack=split)
        engine = Engine(params, cfg, sizes)
        engine.submit(PROMPTS[1], SAMPLED)
        engine._admit()
        held = parameters.nbytes(engine._cache_rows)
        batch = engine._batch(list(engine._running), 4)
        compiled = decode._decode.lower(
            engine._params, engine._cache_rows, batch, static=engine._static, steps=steps, alternatives=0
        ).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= held
        assert memory.temp_size_in_bytes < held / 4
        before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(engine._cache_rows)]
        engine._cache_rows, _ = compiled(engine._params, engine._cache_rows, batch)
        assert sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(engine._cache_rows)) == sorted(before)


def test_batching_is_continuous(model):
    """Lengths of 2 and 20 by turns: with static batches every batch of 4 takes 20 steps, 120 in all."""
    cfg, params = model
    each = [Sampling(max_tokens=20 if i % 4 == 0 else 2, ignore_eos=True) for i in range(24)]
    engine = Engine(params, cfg, SIZES)
    engine.generate([[1, 2, 3, i] for i in range(24)], each)
    assert engine.metrics.generated == sum(s.max_tokens for s in each) == engine.metrics.rows
    assert engine.metrics.decode_calls <= 60
    assert engine.metrics.finished == 24
    assert engine.metrics.utilisation == engine.metrics.generated / (4 * engine.metrics.decode_calls)


def test_a_mesh_gives_the_same_tokens(model, sampled):
    cfg, params = model
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2})
    placed = jax.device_put(params, parameters.shardings(transformer_specs(cfg), mesh, FSDP_TP_EP))
    sizes = dataclasses.replace(FEW, unstack=False)
    engine = Engine(placed, cfg, sizes, mesh=mesh, rules=FSDP_TP_EP)
    _same(engine.generate(PROMPTS[:5], SAMPLED, seed=11), sampled[:5])
    keys = engine._cache_rows[0]["key"]
    assert keys.sharding.shard_shape(keys.shape)[2] == keys.shape[2] // 2  # kv heads over "tensor"
    engine.update(placed)
    with pytest.raises(DecodeError, match="sharding"):
        engine.update(params)
    with use_mesh(mesh, FSDP_TP_EP), pytest.raises(DecodeError, match="both a mesh and rules"):
        Engine(placed, cfg, sizes, mesh=mesh)


def test_prompts_that_cannot_be_decoded_are_refused(model):
    cfg, params = model
    engine = Engine(params, cfg, SIZES)
    for prompt, words in (
        ([], "empty"),
        ([0] * 40, "40 tokens, the engine's sequences hold 40"),
        ([1, 62], "token 62 at position 1"),
        ([-1], "token -1 at position 0"),
        ("abc", "needs a tokenizer"),
    ):
        with pytest.raises(PromptError, match=re.escape(words)):
            engine.submit(prompt, Sampling())
    for sampling, words in ((Sampling(stop=("a",)), "tokenizer"), (Sampling(top_logprobs=21), "exceeds 20")):
        with pytest.raises(DecodeError, match=words):
            engine.submit([1], sampling)
    with pytest.raises(DecodeError, match="seed -1"):
        engine.submit([1], Sampling(), seed=-1)
    with pytest.raises(DecodeError, match="2 samplings for 1 prompts"):
        engine.generate([[1]], [Sampling()] * 2)
    with pytest.raises(PromptError):  # one bad prompt of many: nothing is left in the queue
        engine.generate([[1], []], Sampling())
    assert not engine.busy


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(sequences=0), "sequences 0"),
        (dict(pages=9), "pages 9 of 4 tokens"),
        (dict(prefill_tokens=3), "prefill_tokens 3"),
        (dict(batches=(2, 1, 4)), "batches"),
        (dict(batches=(1, 2)), "must end with 4"),
        (dict(widths=(5,)), "must end with 10"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(setting, words):
    with pytest.raises(DecodeError, match=re.escape(words)):
        dataclasses.replace(SIZES, **setting)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 9)), max_size=60))
def test_no_page_is_dealt_twice_or_lost(operations):
    """Random sequences come, register and go; every page is free, idle, or held as often as sequences hold it."""
    pool, size = PagePool(13, 2), 2
    held: list[tuple[list[int], list[int]]] = []
    for kind, which, length in operations:
        tokens = [which % 3] * (2 * length)
        if kind < 2:
            pages, chain = pool.match(tokens, length)
            missing = length - len(pages)
            if missing + pool.idle(pages) > pool.available:
                continue
            pool.hold(pages)
            new = pool.take(missing)
            assert not set(new) & {page for others, _ in held for page in others}
            pages = pages + new
            for number in range(length - missing, length):
                chain = pool.register(pages[number], chain, tokens[size * number : size * (number + 1)], number)
            held.append((pages, tokens))
        elif kind == 2 and held:
            pool.release(held.pop(which % len(held))[0])
        elif kind == 3 and which == 0:
            pool.forget()
            assert pool.match(tokens, length) == ([], ROOT)
        in_use = [page for pages, _ in held for page in pages]
        assert pool.used == len(set(in_use))
        assert 0 not in in_use
        assert all(pool.holders(page) == in_use.count(page) for page in range(13))
    for pages, _ in held:
        pool.release(pages)
    assert pool.available == 12
    assert sorted(pool.take(12)) == list(range(1, 13))
