"""The mixture layer under every published router: the sorted, blocked experts against the dense oracle, in value and
gradient, with the tokens placed so that experts stay empty, all slots go nowhere, or everything meets one expert.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import params
from moe.experts import dense_experts
from moe.layers import MoEConfig, moe, moe_specs
from moe.routing import RoutingConfig, RoutingError

D, E = 12, 8
ROUTERS = {
    "qwen3": RoutingConfig(E, 3),
    "mixtral_top1": RoutingConfig(E, 1),
    "raw": RoutingConfig(E, 3, renormalise=False, scaling=6.0),
    "chosen": RoutingConfig(E, 3, softmax_over="chosen"),
    "glm": RoutingConfig(E, 3, scoring="sigmoid", selection_bias=True, scaling=1.8),
    "deepseek2": RoutingConfig(
        E, 3, renormalise=False, selection="group_limited", n_group=4, topk_group=2, group_score="max"
    ),
    "interns1": RoutingConfig(E, 4, selection="per_group", n_group=4),
    "interns1_straight": RoutingConfig(E, 4, selection="per_group", n_group=4, straight_through=True),
    "longcat": RoutingConfig(E, 3, renormalise=False, selection_bias=True, free=(("copy", 4),), scaling=6.0),
    "zeda": RoutingConfig(E, 3, free=(("zero", 4),)),
    "moe_plus_plus": RoutingConfig(E, 3, free=(("zero", 1), ("copy", 1), ("constant", 2))),
}


def dense(params, x, index, weights, *, activation):
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, index, weights))
    return dense_experts(params, *flat, activation=activation).reshape(x.shape)


def layer(routing, seed=0):
    cfg = MoEConfig(routing, hidden=10, shared=6)
    rng = np.random.default_rng(seed)
    drawn = params.init(jax.random.key(seed), moe_specs(cfg, D))
    return cfg, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), jnp.float32), drawn)


@functools.partial(jax.jit, static_argnames=("cfg", "experts"))
def value_and_gradient(p, x, seen, valid, cfg, experts):
    def loss(p, x):
        y, routing = moe(p, x, cfg=cfg, valid=valid, experts=experts)
        return (y * seen).sum(), (y, routing.index)

    (_, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(p, x)
    return aux, grads


def compare(cfg, p, x, valid=None):
    seen = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.float32)
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    (y, index), grads = value_and_gradient(p, x, seen, valid, cfg, None)
    (want, want_index), want_grads = value_and_gradient(p, x, seen, valid, cfg, dense)
    np.testing.assert_array_equal(index, want_index)
    np.testing.assert_allclose(y, want, atol=2e-5, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), grads, want_grads)
    return index, grads


# Compiling a gradient takes 3 s: the others differ from these in `route` alone, which test_routing.py covers.
QUICK = ("deepseek2", "interns1_straight", "longcat", "zeda", "moe_plus_plus")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ROUTERS])
def test_every_router(name):
    routing = ROUTERS[name]
    cfg, p = layer(routing)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, D)), jnp.float32)
    valid = jnp.asarray(np.arange(9) < np.array([[9], [5]]))
    index, (grad, _) = compare(cfg, p, x, valid)
    assert (index[1, 5:] == routing.slots).all()
    # Every kind of parameter has a gradient, but for the bias, which only selects, and a router that cannot have one.
    for path, g in jax.tree_util.tree_leaves_with_path(grad):
        name = jax.tree_util.keystr(path)
        silent = "router_bias" in name or (".router" in name and routing.top_k == 1 and routing.renormalise)
        assert np.any(np.abs(g) > 1e-6) != silent, name


@pytest.mark.parametrize("name", ["qwen3", "longcat"])
def test_extreme_loads(name):
    """Everything to one set of experts (the others empty), every slot to parameter-free ones, one token."""
    cfg, p = layer(ROUTERS[name])
    p = p.replace(router_bias=None if p.router_bias is None else jnp.zeros_like(p.router_bias))
    x = jnp.abs(jnp.asarray(np.random.default_rng(2).normal(size=(1, 18, D)), jnp.float32))
    one = p.replace(router=jnp.zeros_like(p.router).at[:, 2:5].set(jnp.array([1.5, 1.0, 0.5])))
    index, (grad, _) = compare(cfg, one, x)
    assert set(np.ravel(index)) == {2, 3, 4}
    assert not np.any(grad.experts.gate_up[5:])
    if cfg.routing.free:
        free = p.replace(router=jnp.zeros_like(p.router).at[:, E : E + 3].set(jnp.array([1.5, 1.0, 0.5])))
        index, (grad, _) = compare(cfg, free, x)
        assert (index >= E).all()
        assert not np.any(grad.experts.down)
    compare(cfg, p, x[:, :1])


def test_gradient_of_the_layer_against_finite_differences():
    cfg, p = layer(ROUTERS["moe_plus_plus"])
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 7, D)), jnp.float32)
    ones = jnp.ones((1, 7), bool)
    seen = jnp.asarray(np.random.default_rng(4).normal(size=x.shape), jnp.float32)
    (_, index), (grad, grad_x) = value_and_gradient(p, x, seen, ones, cfg, None)
    rng = np.random.default_rng(5)

    @jax.jit
    def loss(p, x):
        return (moe(p, x, cfg=cfg, replay=index)[0] * seen).sum()

    def moved(tree, towards, step):
        return jax.tree.map(lambda a, d: a + step * d, tree, towards)

    for _ in range(3):
        dp = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), p)
        dx = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        up, down = (loss(moved(p, dp, step), moved(x, dx, step)) for step in (1e-3, -1e-3))
        pairs = zip(jax.tree.leaves((grad, grad_x)), jax.tree.leaves((dp, dx)), strict=True)
        inner = sum(jnp.vdot(a, b) for a, b in pairs)
        assert float(up - down) / 2e-3 == pytest.approx(float(inner), rel=2e-2, abs=2e-2)


def test_errors():
    with pytest.raises(RoutingError, match="top_k 9"):
        RoutingConfig(E, 9)
    with pytest.raises(ValueError, match="expert width 0"):
        MoEConfig(ROUTERS["qwen3"], hidden=0)
