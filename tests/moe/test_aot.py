"""The sharded train step, compiled by the real TPU compiler for a topology that is not here (extra `tpu`)."""

import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe import params, training
from moe.kernels.aot import count_collectives
from moe.params import ParamSpec
from moe.sharding import FSDP_TP_EP, batch_sharding, constrain, make_mesh, use_mesh

pytestmark = [
    pytest.mark.aot_tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'earthmoe[tpu]'"),
]

D, F, LAYERS, ROWS = 1024, 4096, 4, 1024
SPECS = params.stack({"up": ParamSpec((D, F), ("embed", "mlp")), "down": ParamSpec((F, D), ("mlp", "embed"))}, LAYERS)


def loss(p, batch, rng):
    def layer(x, w):
        h = constrain(jax.nn.silu(x @ w["up"]), "batch", "mlp")
        return constrain(x + h @ w["down"], "batch", "embed"), None

    y, _ = jax.lax.scan(layer, batch["x"].astype(p["up"].dtype), p)
    return training.Mean.of((y - batch["x"]) ** 2), {}


def compiled(topology, shape):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(shape, devices=devices)
    optimizer = optax.adamw(1e-3)
    state = training.abstract_state(params.abstract(SPECS, mesh, FSDP_TP_EP), optimizer)
    step = training.make_train_step(
        loss, optimizer, clip_norm=1.0, policy=training.Policy("bfloat16"), shardings=training.state_shardings(state)
    )
    batch = {"x": jax.ShapeDtypeStruct((ROWS, D), jnp.float32, sharding=batch_sharding(mesh, FSDP_TP_EP))}
    with use_mesh(mesh, FSDP_TP_EP):
        return step.lower(state, batch).compile()


@pytest.mark.parametrize(
    ("topology", "shape"),
    [("v5e:2x2", {"fsdp": 4}), ("v5e:2x2", {"fsdp": 2, "tensor": 2}), ("v5p:2x2x1", {"data": 2, "fsdp": 2})],
)
def test_train_step_on_tpu(topology, shape):
    step = compiled(topology, shape)
    memory, text = step.memory_analysis(), step.as_text()
    assert memory
    assert text
    # fp32 parameters and two Adam moments, divided over the axes that split weights; the rows of the batch are small
    # beside them.
    split = shape.get("fsdp", 1) * shape.get("tensor", 1)
    weights = 3 * params.nbytes(SPECS) // split
    rows = ROWS * D * 4 // (shape.get("fsdp", 1) * shape.get("data", 1))
    assert weights + rows <= memory.argument_size_in_bytes < 1.02 * (weights + rows)
    # Donation: the new state takes the place of the old one.
    assert memory.alias_size_in_bytes >= 0.98 * weights
    found = count_collectives(text)
    assert found["all-gather"] > 0, "FSDP gathers a weight before its matmul"
    assert found["all-reduce"] + found["reduce-scatter"] > 0, "gradients are summed over the batch's axes"
    if "tensor" not in shape:
        assert found["all-to-all"] == 0


def test_replicated_weights_are_not_gathered():
    """The counter has teeth: on a pure data axis nothing is gathered."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh({"data": 4}, devices=devices)
    w = jax.ShapeDtypeStruct((D, F), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    x = jax.ShapeDtypeStruct((ROWS, D), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    text = jax.jit(lambda x, w: x @ w).lower(x, w).compile().as_text()
    assert text
    assert not count_collectives(text)
