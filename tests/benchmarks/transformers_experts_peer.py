"""transformers' side of `python -m tests.bench_moe`: a process that runs its Qwen3-MoE block as often as it is told to.

It runs in whatever environment has torch and transformers, so it imports neither jax nor this library. Called as
`PYTHON transformers_experts_peer.py SETUP.json`; it answers on stdout with one JSON object a line: first a description
of itself, then one to each line of stdin, {"experts": "eager" | "grouped_mm", "tokens": n, "backward": bool, "calls":
n}, with the seconds of every call. With {"save": path} it writes the output for a comparison of values instead.

The block is `Qwen3MoeSparseMoeBlock`: router, softmax, top-k, renormalise, experts, combine. Forward runs under
`torch.inference_mode`. Forward+backward takes the gradients of every parameter and of the input; gradients are set to
None before each call, outside the timing.
"""

import importlib.metadata
import json
import sys
import time
import warnings

import numpy as np
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock


def build(setup: dict) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """(block, inputs [T, D], gradient of the output [T, D]) with the weights of our layer."""
    torch.set_num_threads(setup["cores"])
    data = np.load(setup["data"])
    experts, _, width, hidden = data["gate_up"].shape
    cfg = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=setup["top_k"],
        norm_topk_prob=True,
        hidden_act="silu",
    )
    block = Qwen3MoeSparseMoeBlock(cfg)
    weights = {
        "gate.weight": data["router"].T,
        "experts.gate_up_proj": np.concatenate([data["gate_up"][:, 0], data["gate_up"][:, 1]], 2).swapaxes(1, 2),
        "experts.down_proj": data["down"].swapaxes(1, 2),
    }
    block.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()})
    return block, torch.from_numpy(data["x"]), torch.from_numpy(data["grad"])


def main() -> None:
    warnings.simplefilter("ignore")  # of the peer's own dependencies
    with open(sys.argv[1]) as file:
        setup = json.load(file)
    answers, sys.stdout = sys.stdout, sys.stderr
    block, inputs, grads = build(setup)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        block.experts.config._experts_implementation = job["experts"]
        x, grad = inputs[None, : job["tokens"]], grads[None, : job["tokens"]]
        if "save" in job:
            with torch.inference_mode():
                np.save(job["save"], block(x)[0].numpy())
        seconds = []
        for _ in range(job.get("calls", 0)):
            if job["backward"]:
                block.zero_grad(set_to_none=True)
                x = x.detach().requires_grad_()
                start = time.perf_counter()
                (block(x) * grad).sum().backward()
            else:
                start = time.perf_counter()
                with torch.inference_mode():
                    block(x)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
