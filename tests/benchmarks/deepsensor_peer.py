"""DeepSensor's side of `python -m tests.bench`: a process that trains a ConvNP for as many steps as it is told to.

It runs in whatever environment has DeepSensor (the extra `parity`, or an interpreter of its own given by `--peer`), so
it imports neither jax nor this library. Called as `PYTHON deepsensor_peer.py SETUP.json`; it answers on stdout with one
JSON object a line, first a description of itself, then one answer to each line of stdin, which holds a number of steps.

DeepSensor gets the values in the form that is cheapest for it (choices ours). Every history slot of every variable is a
column of one context set and every lead of every target variable a column of one target set; the idiomatic form, a set
of its own for each slot and lead, encodes and decodes once per set and is slower. Missing context values become the
normalised mean, because a set drops a station where any of its columns is missing. Batches need tasks of equally many
targets, so only tasks whose targets are complete are used. Tasks are made beforehand, outside the timing.
"""

import importlib.metadata
import json
import sys
import time
import warnings

import numpy as np
import pandas as pd


def frame(values: np.ndarray, times: np.ndarray, where: np.ndarray, names: list[str], hours: list[int]) -> pd.DataFrame:
    """Hourly values [T, S, V] shifted by each of `hours`, as columns `NAME@HOURS`, indexed by (time, latitude,
    longitude) as DeepSensor wants it.
    """
    total, sites, _ = values.shape
    columns = {}
    for shift in hours:
        moved = np.full(values.shape, np.nan, np.float32)
        source = slice(max(shift, 0), total + min(shift, 0))
        moved[max(-shift, 0) : total - max(shift, 0)] = values[source]
        columns |= {f"{name}@{shift:+d}h": moved[:, :, i].ravel() for i, name in enumerate(names)}
    index = [np.repeat(times, sites), np.tile(where[:, 0], total), np.tile(where[:, 1], total)]
    return pd.DataFrame(columns, index=pd.MultiIndex.from_arrays(index, names=["time", "latitude", "longitude"]))


def span(where: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ranges of latitude and longitude mapped to 0..1. They are equally wide: DeepSensor 0.4.4 fails on others with
    numpy 2.4 (`only 0-dimensional arrays can be converted`), and a degree would differ from a degree.
    """
    centre, half = (where.max(0) + where.min(0)) / 2, 0.5 * np.ptp(where, axis=0).max()
    # Rounded to binary fractions, so that the two widths are the same number.
    centre, half = np.round(centre * 64) / 64, np.ceil(half * 64) / 64
    (a, b), (c, d) = ((float(m - half), float(m + half)) for m in centre)
    return (a, b), (c, d)


def build(setup: dict):
    """(trainer, tasks, description)."""
    import deepsensor.torch  # noqa: F401 # pyright: ignore[reportMissingImports] # chooses the backend
    import torch  # pyright: ignore[reportMissingImports]
    from deepsensor.data import DataProcessor, TaskLoader  # pyright: ignore[reportMissingImports]
    from deepsensor.model import ConvNP  # pyright: ignore[reportMissingImports]
    from deepsensor.model.nps import compute_encoding_tensor  # pyright: ignore[reportMissingImports]
    from deepsensor.train import Trainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(setup["cores"])
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 # DeepSensor shuffles with the global generator
    data = np.load(setup["data"])
    values, where, times = data["values"], data["where"], data["times"]
    names, targets = setup["variables"], setup["targets"]
    context = frame(values, times, where, names, [-round(s) for s in setup["slots"]])
    columns = [names.index(name) for name in targets]
    target = frame(values[:, :, columns], times, where, targets, [round(lead) for lead in setup["leads"]])

    x1_map, x2_map = span(where)
    processor = DataProcessor(x1_name="latitude", x1_map=x1_map, x2_name="longitude", x2_map=x2_map)
    context, target = processor([context, target])
    observed = context.notna().groupby(level="time").sum().sum(axis=1)
    whole = target.notna().all(axis=1).groupby(level="time").all()
    loader = TaskLoader(context=context.fillna(0.0), target=target, time_freq="h")
    dates = np.intersect1d(whole.index[whole], data["train_times"])
    if len(dates) < setup["batch"]:
        raise ValueError(f"{len(dates)} training times have complete targets, a batch needs {setup['batch']}")
    dates = np.random.default_rng(0).choice(dates, setup["batch"] * setup["batches"], replace=True)
    start = time.perf_counter()
    made = {date: loader(date, context_sampling="all", target_sampling="all") for date in np.unique(dates)}
    seconds = (time.perf_counter() - start) / len(made)
    tasks = [made[date] for date in dates]
    density = {} if setup["density"] is None else {"internal_density": setup["density"]}
    model = ConvNP(processor, loader, verbose=False, **density)
    trainer = Trainer(model, lr=5e-5)
    grid = compute_encoding_tensor(model, tasks[0]).shape[-2:]
    about = {
        "versions": {name: importlib.metadata.version(name) for name in ("deepsensor", "torch", "numpy")},
        "density": model.config["internal_density"],
        "grid": [int(n) for n in grid],
        "parameters": sum(p.numel() for p in model.model.parameters() if p.requires_grad),
        "inputs": float(np.mean([observed[date] for date in dates])),
        "scored": float(np.mean([task["Y_t"][0].size for task in tasks])),
        "task_seconds": seconds,
    }
    return trainer, tasks, about


def main() -> None:
    warnings.simplefilter("ignore")  # of the peer's own dependencies
    with open(sys.argv[1]) as file:
        setup = json.load(file)
    answers, sys.stdout = sys.stdout, sys.stderr
    trainer, tasks, about = build(setup)
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        steps = int(line)
        count = steps * setup["batch"]
        part = [tasks[i % len(tasks)] for i in range(count)]
        wall, cpu = time.perf_counter(), time.process_time()
        losses = trainer(part, batch_size=setup["batch"])
        answer = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "losses": np.float64(losses).tolist(),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
