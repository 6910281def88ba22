"""Meshes, rules and constraints on eight host devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.sharding import (
    DP,
    FSDP,
    FSDP_EP,
    FSDP_TP_EP,
    PRESETS,
    AxisRules,
    HostShard,
    constrain,
    current_rules,
    global_batch,
    host_shard,
    make_mesh,
    partition_spec,
    use_mesh,
)


def test_make_mesh_fills_one_size():
    assert dict(make_mesh({"data": -1, "tensor": 2}).shape) == {"data": 4, "tensor": 2}
    assert make_mesh({"data": 2, "fsdp": 2}, devices=jax.devices()[:4]).size == 4


@pytest.mark.parametrize("shape", [{"data": 3}, {"data": -1, "tensor": 3}, {"data": -1, "tensor": -1}, {"data": 0}])
def test_make_mesh_refuses(shape):
    with pytest.raises(ValueError, match="mesh shape"):
        make_mesh(shape)


@pytest.mark.parametrize(
    ("rules", "mesh", "axes", "kind", "expected"),
    [
        (DP, {"data": 8}, ("embed", "mlp"), "weights", P()),
        (DP, {"data": 8}, ("batch", "seq", "embed"), "activations", P("data")),
        (FSDP, {"data": 2, "fsdp": 4}, ("embed", "mlp"), "weights", P("fsdp")),
        (FSDP, {"data": 2, "fsdp": 4}, ("batch", "seq", "embed"), "activations", P(("data", "fsdp"))),
        (FSDP_EP, {"fsdp": 4, "expert": 2}, ("expert", "embed", "mlp"), "weights", P("expert", "fsdp")),
        (FSDP_EP, {"fsdp": 4, "expert": 2}, ("expert", "capacity", "embed"), "activations", P("expert")),
        (
            FSDP_TP_EP,
            {"fsdp": 2, "expert": 2, "tensor": 2},
            ("expert", "embed", "mlp"),
            "weights",
            P("expert", "fsdp", "tensor"),
        ),
        (FSDP_TP_EP, {"fsdp": 4, "tensor": 2}, ("embed", "heads", None), "weights", P("fsdp", "tensor")),
        (FSDP_TP_EP, {"fsdp": 4, "tensor": 2}, ("batch", None, "heads"), "activations", P("fsdp", None, "tensor")),
    ],
)
def test_presets(rules, mesh, axes, kind, expected):
    assert partition_spec(axes, make_mesh(mesh), rules, kind=kind) == expected
    assert PRESETS[rules.name] is rules


def test_collisions_unknown_axes_and_unused_mesh_axes_are_errors():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' over mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), mesh, FSDP_TP_EP)
    with pytest.raises(ValueError, match="did you mean 'vocab'"):
        partition_spec(("vocabulary",), mesh, FSDP_TP_EP)
    with pytest.raises(ValueError, match=r"size 6.*does not divide over mesh axes \('fsdp',\)"):
        partition_spec(("embed",), mesh, FSDP_TP_EP, shape=(6,))
    with pytest.raises(ValueError, match="'tensor' of size 2 is used by no rule of FSDP"), use_mesh(mesh, FSDP):
        pass
    with pytest.raises(ValueError, match="two rules"):
        AxisRules("twice", (("embed", ()), ("embed", ("data",))), ())
    with pytest.raises(TypeError):
        AxisRules.of("string", weights={"embed": "fsdp"})  # pyright: ignore[reportArgumentType]


def test_rules_can_be_extended():
    rules = FSDP.replace(weights={"station": ("fsdp",), "embed": ()})
    mesh = make_mesh({"data": 2, "fsdp": 4})
    assert partition_spec(("station", "embed"), mesh, rules) == P("fsdp")
    assert partition_spec(("embed",), mesh, FSDP) == P("fsdp"), "the preset itself is unchanged"


def test_constrain_is_nothing_without_a_mesh():
    x = jnp.ones((3, 5))
    assert constrain(x, "batch", "no such axis") is x
    with pytest.raises(ValueError, match="1 axis names"):
        constrain(x, "batch")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_constrain_places_by_the_rules_in_context(axis_type):
    mesh = make_mesh({"data": 4, "tensor": 2}, axis_types=axis_type)
    x = jnp.ones((8, 3, 4))
    f = jax.jit(lambda x: constrain(x * 2, "batch", "seq", "heads"))
    assert len(f(x).sharding.device_set) == 1
    with use_mesh(mesh, FSDP_TP_EP):
        assert current_rules() == FSDP_TP_EP
        placed = f(x)
        assert placed.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "tensor")), 3)
    # Other rules on the same mesh must not reuse the first trace.
    swapped = FSDP_TP_EP.replace(activations={"batch": ("tensor",), "heads": ("data",)})
    with use_mesh(mesh, swapped):
        assert f(x).sharding.is_equivalent_to(NamedSharding(mesh, P("tensor", None, "data")), 3)
    assert current_rules() is None
    np.testing.assert_array_equal(placed, np.full((8, 3, 4), 2.0))


def test_constrain_leaves_manual_axes_alone():
    mesh = make_mesh({"data": 4, "tensor": 2})

    def body(x):
        return constrain(x, "batch", "heads") + jax.lax.axis_index("data")

    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))
    with use_mesh(mesh, FSDP_TP_EP):
        got = f(jnp.zeros((8, 4)))
    np.testing.assert_array_equal(got, np.repeat(np.arange(4.0), 2)[:, None] * np.ones(4))


def test_global_batch_splits_rows():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {"x": np.arange(24.0).reshape(8, 3), "n": np.arange(8)}
    placed = global_batch(batch, mesh, FSDP_TP_EP)
    np.testing.assert_array_equal(placed["x"], batch["x"])
    assert placed["x"].addressable_shards[0].data.shape == (2, 3)
    assert placed["n"].sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 1)
    assert host_shard(mesh, FSDP_TP_EP) == HostShard(0, 1)
    assert global_batch({}, mesh, FSDP_TP_EP) == {}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": np.zeros((8, 2)), "y": np.zeros(4)}, r"'y'.*\(4,\).*leading size \(8,\)"),
        ({"x": np.zeros((8, 2)), "s": np.float32(1)}, "'s'"),
        ({"x": np.zeros((6, 2))}, "6 rows does not divide over 4"),
    ],
)
def test_global_batch_refuses(batch, message):
    with pytest.raises(ValueError, match=message):
        global_batch(batch, make_mesh({"data": 4, "tensor": 2}), FSDP_TP_EP)
