"""Sampling: filters against transformers and against definitions, draws against probabilities, keys, bad settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.models.sampling import (
    Sampling,
    SamplingError,
    Settings,
    adjust,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
    settings,
    token_keys,
)

B, V = 6, 301
LOGITS = np.random.default_rng(0).normal(size=(B, V)).astype(np.float32) * 3
Z = jnp.asarray(LOGITS)


def _row(**changes) -> Settings:
    return settings([Sampling(**changes)] * B)


def _softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_top_k_keeps_the_k_largest_of_each_row():
    k = np.array([0, 1, 2, 50, V, V + 9], np.int32)
    kept = np.isfinite(jax.jit(keep_top_k)(LOGITS, k))
    for row in range(B):
        expected = np.ones(V, bool)
        if k[row]:
            expected[np.argsort(LOGITS[row])[: max(V - k[row], 0)]] = False
        np.testing.assert_array_equal(kept[row], expected)


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    p = np.array([1e-6, 0.3, 0.9, 0.95, 0.999, 1.0], np.float32)
    kept = np.isfinite(jax.jit(keep_top_p)(LOGITS, p))
    shares = _softmax(LOGITS.astype(np.float64))
    assert kept.sum(-1)[[0, 5]].tolist() == [1, V]
    for row in range(1, 5):
        inside, outside = shares[row][kept[row]], shares[row][~kept[row]]
        assert inside.sum() >= p[row] - 1e-6
        assert inside.sum() - inside.min() < p[row]
        assert inside.min() > outside.max()


def test_equal_logits_stay_or_go_together():
    z = jnp.array([[3.0, 1.0, 1.0, 1.0, -2.0]])
    assert np.isfinite(keep_top_k(z, jnp.array([2]))).tolist() == [[True, True, True, True, False]]
    assert np.isfinite(keep_top_p(z, jnp.array([0.75], jnp.float32))).tolist() == [[True, True, True, True, False]]


def test_min_p_is_relative_to_the_likeliest():
    p = np.array([0, 0.01, 0.1, 0.5, 0.9, 1.0], np.float32)
    kept = np.isfinite(keep_min_p(Z, jnp.asarray(p)))
    shares = _softmax(LOGITS)
    np.testing.assert_array_equal(kept, shares >= p[:, None] * shares.max(-1, keepdims=True) * (1 - 1e-6))


def test_rows_keep_their_own_settings():
    mixed = [
        Sampling(temperature=0.5),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.2),
        Sampling(temperature=1.7, top_k=40, top_p=0.9, min_p=0.01),
        Sampling(temperature=0),
    ]
    together = adjust(Z, settings(mixed))
    for row, one in enumerate(mixed):
        np.testing.assert_array_equal(together[row], adjust(Z[row : row + 1], settings([one]))[0])


@pytest.mark.slow
def test_filters_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    chain = [
        warpers.TemperatureLogitsWarper(0.7),
        warpers.TopKLogitsWarper(40),
        warpers.TopPLogitsWarper(0.85),
        warpers.MinPLogitsWarper(0.05),
    ]
    theirs = torch.tensor(LOGITS)
    for warper in chain:
        theirs = warper(None, theirs)
    ours = adjust(Z, _row(temperature=0.7, top_k=40, top_p=0.85, min_p=0.05))
    np.testing.assert_allclose(_softmax(np.asarray(ours)), torch.softmax(theirs, -1).numpy(), atol=1e-6)


def _keys(count: int, seed: int = 0):
    zeros = np.zeros(count, np.uint32)
    return _token_keys(zeros + seed, zeros, zeros, np.arange(count))


def _token_keys(seed, request, number, position):
    unsigned = (jnp.asarray(a, jnp.uint32) for a in (seed, request, number))
    return token_keys(*unsigned, jnp.asarray(position, jnp.int32))


def test_draws_follow_the_distribution():
    """Chi-square over 40,000 draws from 600 tokens, more than two blocks of the draw; rare tokens pooled."""
    count, size = 40_000, 600
    z = np.random.default_rng(1).normal(size=size).astype(np.float32) * 2
    rows = Settings(*(np.full(count, value, np.float32) for value in (1.0, 0, 1.0, 0.0)))
    rows = rows.replace(top_k=np.zeros(count, np.int32))
    drawn = jax.jit(sample)(jnp.broadcast_to(z, (count, size)), _keys(count), rows)
    expected = _softmax(z.astype(np.float64)) * count
    seen = np.bincount(drawn.token, minlength=size)
    large = expected >= 10
    seen = np.append(seen[large], seen[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    statistic, freedom = ((seen - expected) ** 2 / expected).sum(), len(seen) - 1
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    np.testing.assert_allclose(drawn.logprob, np.log(_softmax(z))[drawn.token], atol=1e-5)
    np.testing.assert_allclose(drawn.sampling_logprob, drawn.logprob, atol=1e-5)


def test_draws_come_from_what_the_filters_keep_and_report_its_probability():
    one = Sampling(temperature=0.6, top_k=4)
    count = 500
    z = jnp.broadcast_to(LOGITS[0], (count, V))
    drawn = jax.jit(sample)(z, _keys(count), settings([one] * count))
    best = np.argsort(LOGITS[0])[-4:]
    assert set(np.asarray(drawn.token).tolist()) == set(best.tolist())
    shares = dict(zip(best.tolist(), _softmax(LOGITS[0][best] / 0.6), strict=True))
    expected = [np.log(shares[token]) for token in np.asarray(drawn.token).tolist()]
    np.testing.assert_allclose(drawn.sampling_logprob, expected, atol=1e-5)
    np.testing.assert_allclose(drawn.logprob, np.log(_softmax(LOGITS[0]))[drawn.token], atol=1e-5)


def test_greedy_rows_take_the_likeliest_beside_sampled_ones():
    rows = settings([Sampling(temperature=0)] * 3 + [Sampling(temperature=5.0)] * 3)
    drawn = sample(Z, _keys(B), rows)
    np.testing.assert_array_equal(drawn.token[:3], LOGITS[:3].argmax(-1))
    assert (np.asarray(drawn.sampling_logprob[:3]) == 0).all()
    assert (np.asarray(drawn.token[3:]) != LOGITS[3:].argmax(-1)).any()


def test_extreme_settings_stay_finite():
    z = np.full((3, 8), -np.inf, np.float32)
    z[:, 5] = [1e30, -1e30, 0]
    rows = settings([Sampling(temperature=1e-30, top_p=1e-9, min_p=1.0, top_k=1)] * 3)
    drawn = sample(jnp.asarray(z), _keys(3), rows)
    assert drawn.token.tolist() == [5, 5, 5]
    assert drawn.finite.all()
    assert drawn.sampling_logprob.tolist() == [0, 0, 0]


def test_logits_that_are_not_finite_are_reported():
    z = LOGITS.copy()
    z[1, 7], z[2, 7], z[3] = np.nan, np.inf, -np.inf
    for temperature in (0.0, 1.0):
        drawn = sample(jnp.asarray(z), _keys(B), _row(temperature=temperature))
        assert drawn.finite.tolist() == [True, False, False, False, True, True]


def test_keys_depend_on_each_number_and_on_nothing_else():
    numbers = np.array([[1, 2, 3, 4], [2, 2, 3, 4], [1, 3, 3, 4], [1, 2, 4, 4], [1, 2, 3, 5]])
    keys = jax.random.key_data(_token_keys(*numbers.T))
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 5
    alone = _token_keys(*numbers[3:4].T)
    np.testing.assert_array_equal(jax.random.key_data(alone)[0], keys[3])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(temperature=-0.1), "temperature -0.1"),
        (dict(temperature=float("nan")), "temperature nan"),
        (dict(top_k=-1), "top_k -1"),
        (dict(top_p=0.0), "top_p 0.0"),
        (dict(top_p=1.01), "top_p 1.01"),
        (dict(min_p=-0.5), "min_p -0.5"),
        (dict(max_tokens=0), "max_tokens 0"),
        (dict(n=0), "n 0"),
        (dict(stop=("",)), "stop"),
        (dict(stop_ids=(-1,)), "stop_ids"),
        (dict(top_logprobs=-1), "top_logprobs -1"),
    ],
)
def test_settings_without_meaning_are_refused(setting, words):
    with pytest.raises(SamplingError, match=words):
        Sampling(**setting)
