"""A small training run in a process of its own, for the tests that kill it or split it over processes.

Regression of a shuffled table by a two-layer network, with noise drawn from the state's key, through moe's own loop. On
a mesh the rows are split over all devices of all processes.
"""

import argparse
import contextlib
import os
import pathlib
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint-every", type=int, default=7)
    parser.add_argument("--devices", type=int, default=1, help="host devices of this process")
    parser.add_argument("--coordinator", help="host:port, for several processes")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.1)
    arguments = parser.parse_args()

    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.devices}"
    import grain
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from moe import params, training
    from moe.sharding import FSDP, constrain, global_batch, host_shard, make_mesh, use_mesh

    if arguments.processes > 1:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    split = arguments.processes > 1 or arguments.devices > 1
    mesh = make_mesh({"data": 2, "fsdp": -1}) if split else None

    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype(np.float32)
    table = [{"x": x[i], "y": np.sin(x[i, :3]), "mask": np.float32(rng.random() < 0.7)} for i in range(256)]
    batches = grain.MapDataset.source(table).seed(3).shuffle().repeat().batch(32)
    if mesh is not None:
        shard = host_shard(mesh, FSDP)
        batches = batches.map(lambda batch: {k: np.split(v, shard.count)[shard.index] for k, v in batch.items()})
    data = iter(batches.to_iter_dataset())

    specs = {
        "hidden": params.ParamSpec((8, 64), (None, "embed"), params.Normal(0.3)),
        "out": params.ParamSpec((64, 3), ("embed", None), params.Normal(0.1)),
        "bias": params.ParamSpec((3,), (None,), params.zeros),
    }

    def loss(p, batch, key):
        noisy = batch["x"] + arguments.noise * jax.random.normal(key, batch["x"].shape)
        hidden = constrain(jnp.tanh(noisy @ p["hidden"]), "batch", None)
        error = hidden @ p["out"] + p["bias"] - batch["y"]
        return training.Mean.of(error**2, batch["mask"][:, None]), {}

    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 1000))
    values = params.init(jax.random.key(0), specs, mesh, None if mesh is None else FSDP)
    state = training.init_state(values, optimizer, jax.random.key(1), ema=True)
    step = training.make_train_step(
        loss,
        optimizer,
        clip_norm=1.0,
        ema_decay=0.99,
        shardings=training.state_shardings(state) if mesh is not None else None,
    )
    with use_mesh(mesh, FSDP) if mesh is not None else contextlib.nullcontext():
        training.fit(
            step,
            state,
            data,
            steps=arguments.steps,
            directory=arguments.directory,
            config={"noise": arguments.noise},
            checkpoint_every=arguments.checkpoint_every,
            log_every=1,
            place=None if mesh is None else lambda batch: global_batch(batch, mesh, FSDP),
            progress=False,
        )
    print("finished", file=sys.stderr)


if __name__ == "__main__":
    main()
