"""Parameter declarations: independence of draws, moments of the initialisers, sharded == unsharded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from moe import params
from moe.params import Constant, FanIn, Normal, Param, ParamSpec, TruncatedNormal, ones, zeros
from moe.sharding import DP, FSDP, FSDP_TP_EP, make_mesh


@struct.dataclass
class Block:
    w: Param
    b: Param


def block(d: int, f: int) -> Block:
    return Block(w=ParamSpec((d, f), ("embed", "mlp")), b=ParamSpec((f,), ("mlp",), zeros))


def specs() -> dict[str, Any]:
    return {
        "first": block(8, 16),
        "blocks": params.stack(block(16, 16), 3),
        "scale": ParamSpec((8,), ("embed",), ones, jnp.bfloat16),
    }


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_init_gives_the_declared_tree():
    values = params.init(jax.random.key(0), specs())
    assert isinstance(values["first"], Block)
    assert values["blocks"].w.shape == (3, 16, 16)
    assert values["scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(values["first"].b, np.zeros(16))
    assert params.count(values) == params.count(specs()) == 8 * 16 + 16 + 3 * (16 * 16 + 16) + 8
    assert params.nbytes(specs()) == 4 * (params.count(specs()) - 8) + 2 * 8
    layers = np.asarray(values["blocks"].w)
    assert not np.array_equal(layers[0], layers[1]), "every layer of a stack is drawn anew"


def test_adding_a_parameter_changes_no_other():
    before = params.init(jax.random.key(3), specs())
    after = params.init(jax.random.key(3), {"aaa": ParamSpec((8, 16), ("embed", "mlp")), **specs()})
    assert_same(before, {name: after[name] for name in before})
    assert not np.array_equal(after["aaa"], after["first"].w), "same shape, other path, other draw"
    other = params.init(jax.random.key(4), specs())
    assert not np.array_equal(other["first"].w, before["first"].w)


@pytest.mark.parametrize("rules", [DP, FSDP, FSDP_TP_EP], ids=lambda r: r.name)
def test_sharded_init_is_the_unsharded_one(rules):
    shape = {"DP": {"data": 8}, "FSDP": {"data": 2, "fsdp": 4}, "FSDP_TP_EP": {"fsdp": 4, "tensor": 2}}[rules.name]
    mesh = make_mesh(shape)
    placed = params.init(jax.random.key(0), specs(), mesh, rules)
    assert_same(placed, params.init(jax.random.key(0), specs()))
    wanted = params.shardings(specs(), mesh, rules)
    jax.tree.map(
        lambda leaf, sharding: pytest.fail(str(leaf.sharding)) if leaf.sharding != sharding else None, placed, wanted
    )
    parts = {"DP": 1, "FSDP": 4, "FSDP_TP_EP": 8}[rules.name]
    assert placed["first"].w.addressable_shards[0].data.size == 8 * 16 // parts


def test_abstract_describes_what_init_makes():
    mesh = make_mesh({"fsdp": 8})
    values = params.init(jax.random.key(0), specs(), mesh, FSDP)
    described = params.abstract(specs(), mesh, FSDP)
    assert jax.tree.structure(values) == jax.tree.structure(described)
    for value, leaf in zip(jax.tree.leaves(values), jax.tree.leaves(described), strict=True):
        assert (value.shape, value.dtype, value.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)


@pytest.mark.parametrize(
    ("init", "shape", "std"),
    [
        (Normal(0.02), (400, 300), 0.02),
        (TruncatedNormal(0.5), (400, 300), 0.5),
        (FanIn(), (400, 300), 400**-0.5),
        (FanIn(scale=2.0), (4, 100, 300), (2 / 100) ** 0.5),
        (FanIn(axes=(-3, -2)), (8, 50, 300), 400**-0.5),
    ],
)
def test_initialiser_moments(init, shape, std):
    draw = np.asarray(init(jax.random.key(1), shape, jnp.float32))
    n = draw.size
    assert abs(draw.mean()) < 5 * std / n**0.5
    assert abs(draw.std() / std - 1) < 5 / (2 * n) ** 0.5
    if not isinstance(init, Normal):
        assert np.abs(draw).max() <= 2 * std / 0.8796 + 1e-6


def test_constant_is_repeated_over_a_stack():
    table = np.arange(6.0).reshape(2, 3)
    spec = params.stack({"t": ParamSpec((2, 3), (None, None), Constant(table))}, 4)
    np.testing.assert_array_equal(params.init(jax.random.key(0), spec)["t"], np.broadcast_to(table, (4, 2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParamSpec((3, 4), ("embed",)), "one a dimension|give one"),
        (lambda: ParamSpec((3, 0), ("embed", "mlp")), "positive"),
        (lambda: ParamSpec((3, 3), ("embed", "embed")), "repeat"),
        (lambda: FanIn(axes=(0,)), "from the end"),
        (lambda: params.init(jax.random.key(0), {"w": ParamSpec((3,), ("embed",))}), "do not exist"),
        (lambda: params.init(jax.random.key(0), specs(), make_mesh({"fsdp": 8})), "both"),
        (
            lambda: params.shardings({"deep": {"w": ParamSpec((6, 4), ("embed", None))}}, make_mesh({"fsdp": 8}), FSDP),
            r"'deep/w'.*size 6.*does not divide",
        ),
        (
            lambda: params.shardings({"w": ParamSpec((8,), ("embd",))}, make_mesh({"fsdp": 8}), FSDP),
            r"'w'.*'embd'.*did you mean 'embed'",
        ),
    ],
)
def test_errors_name_the_culprit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_leaf_that_is_no_spec_is_refused():
    with pytest.raises(TypeError, match="'a/1'"):
        params.init(jax.random.key(0), {"a": [ParamSpec((2,), (None,), zeros), jnp.zeros(2)]})
