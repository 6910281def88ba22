"""A cycling stage of `earth.train.train` in a process of its own, for the tests that kill it or split it.

The fitted parts come pickled from the test, so that every run starts from the same bits.
"""

import argparse
import os
import pathlib
import pickle
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prepared", type=pathlib.Path, required=True, help="pickle of (Prepared, TrainConfig)")
    parser.add_argument("--directory", type=pathlib.Path, required=True)
    parser.add_argument("--devices", type=int, default=1, help="host devices of this process")
    parser.add_argument("--coordinator", help="host:port, for several processes")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()

    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.devices}"
    import jax
    import numpy as np

    from earth.train import train
    from moe.sharding import make_mesh

    if arguments.processes > 1:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    data, config = pickle.loads(arguments.prepared.read_bytes())
    mesh = make_mesh({"data": -1}) if arguments.processes * arguments.devices > 1 else None
    params = train(data, config, arguments.directory, mesh=mesh, progress=False)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params.network))
    print("finished", file=sys.stderr)


if __name__ == "__main__":
    main()
