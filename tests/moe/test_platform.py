"""Code by platform: only what is lowered is traced, under every transformation the layers use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as P

from moe.kernels.platform import Partial, platform_dependent
from moe.sharding import make_mesh


def traced():
    """(function, log): the function chooses among three and the log says which were traced."""
    log = []

    def branch(name, factor):
        def run(x, tree):
            log.append(name)
            return {"scaled": x * factor, "rest": tree["b"] + 1}

        return run

    choose = functools.partial(
        platform_dependent, default=branch("default", 2.0), tpu=branch("tpu", 3.0), cuda=branch("cuda", 5.0)
    )
    return choose, log


ARGS = (jnp.arange(6.0).reshape(2, 3), {"b": jnp.arange(3), "nothing": None})


@pytest.mark.parametrize(("platform", "factor"), [("cpu", 2.0), ("rocm", 2.0), ("tpu", 3.0), ("cuda", 5.0)])
def test_traces_what_it_lowers(platform, factor):
    choose, log = traced()
    lowered = jax.jit(choose).trace(*ARGS).lower(lowering_platforms=(platform,))
    assert set(log) == {"default", {"rocm": "default", "cpu": "default"}.get(platform, platform)}
    assert f"{factor:.6e}".replace("e+00", "") in lowered.as_text()


def test_eagerly_jitted_and_batched():
    choose, log = traced()
    x, tree = ARGS
    for function in (choose, jax.jit(choose)):
        out = function(x, tree)
        np.testing.assert_array_equal(out["scaled"], 2 * x)
        np.testing.assert_array_equal(out["rest"], [1, 2, 3])
    batched = jax.vmap(choose, in_axes=(1, None))(x, tree)
    np.testing.assert_array_equal(batched["scaled"], 2 * x.T)
    np.testing.assert_array_equal(batched["rest"], [[1, 2, 3]] * 3)
    assert set(log) == {"default"}


def test_several_platforms_in_one_module():
    """jax.export for CPU and TPU holds both and chooses when called."""
    choose, log = traced()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), ARGS)
    exported = jax.export.export(jax.jit(lambda *args: choose(*args)["scaled"]), platforms=("cpu", "tpu"))(*shapes)
    assert set(log) == {"default", "tpu"}
    np.testing.assert_array_equal(exported.call(*ARGS), 2 * ARGS[0])


def test_inside_shard_map():
    choose, _ = traced()
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    sharded = jax.shard_map(
        lambda x, tree: choose(x, tree)["scaled"], mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    np.testing.assert_array_equal(jax.jit(sharded)(*ARGS), 2 * ARGS[0])


def test_equal_partials_share_a_trace():
    log = []

    def run(x, *, factor):
        log.append(factor)
        return factor * x

    x = jnp.arange(3.0)
    for factor in (2.0, 2.0, 4.0):
        np.testing.assert_array_equal(platform_dependent(x, default=Partial(run, factor=factor)), factor * x)
    assert log.count(2.0) == log.count(4.0)
    assert Partial(run, a=1, b=2) == Partial(run, b=2, a=1) != Partial(run, a=1, b=3)


def test_effects_are_refused():
    def noisy(x):
        io_callback(lambda: None, None, ordered=True)
        return x

    with pytest.raises(NotImplementedError, match="has the effects"):
        platform_dependent(jnp.ones(2), default=noisy)
