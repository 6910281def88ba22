"""Golden values of `rl.objectives`: losses, gradients, advantages and weights by the code of their sources.

    python tests/rl/golden/objectives.py --verl GITDIR --slime GITDIR --trl GITDIR_OR_SITE_PACKAGES

Runs functions of verl (1dda039), slime (624b824) and TRL (1.16.0, or commit f2cd577 of its repository) in float64,
from their source text with stubs for what they import besides torch. Needs torch and numpy; the tests need neither.
GITDIR is a clone's directory of objects (".git" or a bare one).
"""

import argparse
import ast
import collections
import math
import pathlib
import subprocess
import sys
import types
import typing

import numpy as np
import torch

COMMITS = {
    "verl": "1dda039b9c6311889a9c9a26040677e1254814f9",
    "slime": "624b824a898ab0ec1fcb4d373004c7f3852bf515",
    "trl": "f2cd57710ae345ea6428ae95363267fcf38a3dc8",
}
HERE = pathlib.Path(__file__).parent
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # some of it would round to float32 on the way


def source(place: str, name: str, path: str) -> str:
    """A file of a clone at the recorded commit, or of an installed package."""
    installed = pathlib.Path(place) / path
    if installed.is_file():
        return installed.read_text()
    command = ["git", f"--git-dir={place}", "show", f"{COMMITS[name]}:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def pick(text: str, names: typing.Iterable[str], known: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Functions (also methods) of a source text by name, without decorators and annotations' imports."""
    wanted, found = set(names), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            node.decorator_list = []
            node.returns = None
            for a in [*node.args.args, *node.args.kwonlyargs]:
                a.annotation = None
            wanted.discard(node.name)
            found.append(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id in wanted:
                wanted.discard(target.id)
                found.append(node)
    assert not wanted, f"not in the source: {wanted}"
    module = ast.Module(sorted(found, key=lambda n: n.lineno), [])
    space = dict(known)
    exec(compile(ast.fix_missing_locations(module), "<source>", "exec"), space)
    return space


class Config(dict):
    __getattr__ = dict.__getitem__


class AlgoConfig(Config):
    pass


def batches() -> dict[str, dict[str, np.ndarray]]:
    """Ragged masks with holes, a sequence without a token, a lone sample, a group without spread; log-ratios mild and
    up to +-30.
    """
    out = {}
    for number, (name, spread) in enumerate((("mild", 0.3), ("extreme", 3.0))):
        rng = np.random.default_rng(number)
        b, t = 9, 12
        length = np.array([12, 5, 9, 1, 12, 7, 3, 10, 0])
        mask = np.arange(t) < length[:, None]
        mask[0, 3:6] = mask[2, 1] = mask[4, 8:10] = False  # what a tool said
        old = -rng.exponential(1.5, (b, t)) - 0.05
        gap = spread * rng.standard_normal((b, t))
        if name == "extreme":
            old[0, 0], gap[0, 0], old[4, 1], gap[4, 1] = -33.0, 30.0, -2.0, -28.0
            old[5, 2], gap[5, 2] = -26.0, 25.0
        new = np.minimum(old + gap, -0.01)
        rollout = np.minimum(old + (0.2 if name == "mild" else 1.0) * rng.standard_normal((b, t)), -0.01)
        rewards = rng.standard_normal(b)
        group = np.array([4, 4, 4, 4, 7, 2, 2, 2, 2])
        rewards[group == 2] = 0.1  # no spread
        token_rewards = np.where(mask, rng.standard_normal((b, t)), 0)
        out[name] = {
            "new": new, "old": old, "rollout": rollout, "ref": old + 0.5 * rng.standard_normal((b, t)), "mask": mask,
            "advantages": rng.standard_normal((b, 1)) * np.ones(t), "token_advantages": rng.standard_normal((b, t)),
            "rewards": rewards, "group": group, "token_rewards": token_rewards, "values": rng.standard_normal((b, t)),
            "components": rng.standard_normal((b, 2)), "greedy": rng.standard_normal(b),
            "squares": rng.uniform(0.05, 0.9, (b, t)), "old_values": rng.standard_normal((b, t)),
        }  # fmt: skip
    return out


class Gold:
    """What is kept: {"case/batch/value": array}."""

    def __init__(self):
        self.out: dict[str, np.ndarray] = {}

    def loss(self, case: str, data: dict[str, np.ndarray], f: typing.Callable[..., torch.Tensor], batch: str) -> None:
        new = torch.tensor(data["new"], requires_grad=True)
        value = f(new, {k: torch.tensor(v) for k, v in data.items()})
        (gradient,) = torch.autograd.grad(value, new)
        self.out[f"loss/{case}/{batch}/value"] = value.detach().numpy()
        self.out[f"loss/{case}/{batch}/gradient"] = gradient.numpy()

    def array(self, case: str, value: typing.Any, batch: str) -> None:
        self.out[f"{case}/{batch}"] = torch.as_tensor(value).detach().numpy()


def verl(place: str, gold: Gold) -> None:
    helpers = pick(
        source(place, "verl", "verl/utils/torch_functional.py"),
        ["masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"],
        {"torch": torch},
    )
    functional = types.SimpleNamespace(**helpers)
    known = {
        "torch": torch, "np": np, "verl_F": functional, "defaultdict": collections.defaultdict,
        "Optional": typing.Optional, "Any": typing.Any, "AlgoConfig": AlgoConfig, "ActorConfig": Config, "math": math,
    }  # fmt: skip
    text = source(place, "verl", "verl/trainer/ppo/core_algos.py")
    kinds = ("vanilla", "gspo", "cispo", "sapo", "geo_mean", "gpg", "dppo_tv", "dppo_kl", "dro", "kl_cov")
    estimators = {
        "grpo": "compute_grpo_outcome_advantage", "rloo": "compute_rloo_outcome_advantage",
        "opo": "compute_opo_outcome_advantage", "pass_at_k": "compute_grpo_passk_outcome_advantage",
        "gpg": "compute_gpg_outcome_advantage", "remax": "compute_remax_outcome_advantage",
        "reinforce_plus_plus": "compute_reinforce_plus_plus_outcome_advantage",
        "reinforce_plus_plus_baseline": "compute_reinforce_plus_plus_baseline_outcome_advantage",
        "gae": "compute_gae_advantage_return",
        "optimal_token_baseline": "compute_optimal_token_baseline_advantage",
    }  # fmt: skip
    f = pick(
        text,
        ["agg_loss", "kl_penalty", "kl_penalty_forward", "compute_value_loss", "compute_policy_loss_reinforce",
         *(f"compute_policy_loss_{kind}" for kind in kinds), *estimators.values()],
        known,
    )  # fmt: skip
    corrections = pick(
        source(place, "verl", "verl/trainer/ppo/rollout_corr_helper.py"),
        ["SAFETY_BOUND", "SUPPORTED_ROLLOUT_RS_OPTIONS", "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS",
         "_parse_rollout_is_threshold", "_parse_rollout_rs_thresholds", "compute_rollout_correction_weights",
         "compute_rollout_rejection_mask", "compute_is_metrics", "compute_rs_metrics"],
        known,
    )  # fmt: skip
    base = dict(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0, tau_pos=1.0, tau_neg=1.05,
        global_batch_info={}, loss_agg_mode="token-mean",
        policy_loss=Config(dro_beta=1e-3, kl_cov_ratio=0.1, ppo_kl_coef=1.0),
    )  # fmt: skip

    def policy(kind: str, agg: str = "token-mean", weights: typing.Any = None, advantages: str = "token_advantages",
               **change: typing.Any) -> typing.Any:  # fmt: skip
        cfg = Config(base | change)

        def run(new: torch.Tensor, d: dict[str, torch.Tensor], mask: typing.Any = None) -> torch.Tensor:
            mask = d["mask"].double() if mask is None else mask
            w = None if weights is None else weights(d)
            name = f"compute_policy_loss_{kind}"
            return f[name](d["old"], new, d[advantages], mask, agg, cfg, w)[0]

        return run

    def tis(level: str, threshold: typing.Any, **more: typing.Any) -> typing.Any:
        return lambda d: corrections["compute_rollout_correction_weights"](
            d["old"] - d["rollout"], d["mask"].double(), level, threshold, **more
        )[0]

    def rejected(option: str, threshold: str) -> typing.Any:
        def run(new: torch.Tensor, d: dict[str, torch.Tensor]) -> torch.Tensor:
            gap = d["old"] - d["rollout"]
            found = corrections["compute_rollout_rejection_mask"](gap, d["mask"].double(), option, threshold)
            return policy("vanilla")(new, d, found[0])

        return run

    def with_kl(kind: str, coefficient: float = 0.1) -> typing.Any:
        def run(new: torch.Tensor, d: dict[str, torch.Tensor]) -> torch.Tensor:
            mask = d["mask"].double()
            kl = f["kl_penalty"](new, d["ref"], kind)
            return policy("vanilla")(new, d) + coefficient * f["agg_loss"](kl, mask, "token-mean")

        return run

    cases = {
        "verl.grpo": policy("vanilla"),
        "verl.grpo token-sum": policy("vanilla", "token-sum"),
        "verl.grpo seq-mean-token-sum": policy("vanilla", "seq-mean-token-sum"),
        "verl.grpo seq-mean-token-mean": policy("vanilla", "seq-mean-token-mean"),
        "verl.dr_grpo": policy("vanilla", "seq-mean-token-sum-norm"),
        "verl.dapo": policy("vanilla", clip_ratio_high=0.28),
        "verl.gspo": policy("gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4),
        "verl.gspo wide": policy("gspo", clip_ratio_low=0.2, clip_ratio_high=0.2),
        "verl.cispo": policy("cispo"),
        "verl.sapo": policy("sapo"),
        "verl.geo_mean": policy("geo_mean"),
        "verl.gpg": policy("gpg"),
        "verl.dppo_tv": policy("dppo_tv", clip_ratio_c=20.0),
        "verl.dppo_kl": policy("dppo_kl", clip_ratio_c=20.0),
        "verl.dro": policy("dro"),
        "verl.kl_cov": policy("kl_cov"),
        "verl.grpo tis": policy("vanilla", weights=tis("token", 2.0)),
        "verl.grpo tis sequence": policy("vanilla", weights=tis("sequence", 2.0)),
        "verl.grpo icepop": policy("vanilla", weights=tis("token", "0.5_5.0")),
        "verl.grpo tis normalised": policy("vanilla", weights=tis("token", 2.0, rollout_is_batch_normalize=True)),
        "verl.grpo tis sequence normalised": policy(
            "vanilla", weights=tis("sequence", 2.0, rollout_is_batch_normalize=True)
        ),
        "verl.geo_mean tis": policy("geo_mean", weights=tis("token", 2.0)),
        "verl.grpo reject token_k1": rejected("token_k1", "0.6_1.5"),
        "verl.grpo reject token_k3": rejected("token_k3", "0.05"),
        "verl.grpo reject seq_mean_k2": rejected("seq_mean_k2", "0.03"),
        "verl.grpo reject seq_sum_k1": rejected("seq_sum_k1", "0.7_1.4"),
        "verl.grpo reject seq_max_k3": rejected("seq_max_k3", "0.1"),
        **{f"verl.grpo kl {kind}": with_kl(kind) for kind in ("k1", "abs", "k2", "k3", "k1+", "k3+")},
    }
    for batch, data in batches().items():
        for case, run in cases.items():
            gold.loss(case, data, run, batch)
        d = {k: torch.tensor(v) for k, v in data.items()}
        mask = d["mask"].double()
        last = torch.zeros_like(mask)
        for i, row in enumerate(data["mask"]):
            if row.any():
                last[i, int(np.flatnonzero(row)[-1])] = d["rewards"][i]
        index, config = data["group"], AlgoConfig(gamma=0.97, norm_adv_by_std_in_grpo=True)
        lone = np.unique(index, return_counts=True)
        several = np.isin(index, lone[0][lone[1] > 1])
        whole = d["rewards"][:, None] * (torch.arange(mask.shape[1]) == 0)  # sums to the reward, whatever the mask
        run = {name: f[function] for name, function in estimators.items()}
        made = {
            "grpo": run["grpo"](whole.clone(), mask, index),
            "dr_grpo": run["grpo"](whole.clone(), mask, index, norm_adv_by_std_in_grpo=False),
            "rloo": run["rloo"](whole.clone(), mask, index),
            "opo": run["opo"](whole.clone(), mask, index),
            "gpg": run["gpg"](whole.clone(), mask, index),
            "reinforce_plus_plus_baseline": run["reinforce_plus_plus_baseline"](whole.clone(), mask, index),
            "reinforce_plus_plus": run["reinforce_plus_plus"](last, mask, config=config),
            "remax": run["remax"](d["token_rewards"], d["greedy"], mask),
            "gae": run["gae"](d["token_rewards"], d["values"], mask, 0.97, 0.9),
            "optimal_token_baseline": run["optimal_token_baseline"](
                d["token_rewards"], mask, index, d["old"], d["squares"]
            ),
        }
        for name, (value, _) in made.items():
            gold.array(f"advantages/{name}", value, batch)
        gold.array("advantages/gae returns", made["gae"][1], batch)
        value, _ = run["pass_at_k"](whole[several], mask[several], index[several], config=config)
        gold.array("advantages/pass_at_k", value, batch)
        parts = [run["grpo"](c[:, None] * (torch.arange(12) == 0), mask, index)[0] for c in d["components"].T]
        total = 0.7 * parts[0] + 1.3 * parts[1]
        gold.array("advantages/gdpo", functional.masked_whiten(total, mask) * mask, batch)
        critic, _ = f["compute_value_loss"](d["values"], d["token_rewards"], d["old_values"], mask, 0.2)
        gold.array("value_loss", critic, batch)


def trl(place: str, gold: Gold) -> None:
    text = source(place, "trl", "trl/trainer/grpo_trainer.py")
    f = pick(text, ["_compute_loss", "get_off_policy_mask", "get_gamma_weights"], {"torch": torch, "math": math})
    utils = source(place, "trl", "trl/trainer/utils.py")
    nanstd = pick(utils, ["nanstd"], {"torch": torch})["nanstd"]

    class Anything(collections.defaultdict):
        pass

    def trainer(**change: typing.Any) -> typing.Any:
        args = dict(
            delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            steps_per_generation=1, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        )  # fmt: skip
        me = dict(
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=0.0,
            loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2, use_vllm=False,
            vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1, max_completion_length=20,
            aux_loss_enabled=False, router_aux_loss_coef=0.0, _entropy_bonus_enabled=False,
        )  # fmt: skip
        args |= {k: v for k, v in change.items() if k in args}
        me |= {k: v for k, v in change.items() if k in me}
        accelerator = types.SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        )
        metrics = {"train": Anything(list), "eval": Anything(list)}
        return types.SimpleNamespace(
            **me, args=types.SimpleNamespace(**args), accelerator=accelerator, _metrics=metrics,
            model=types.SimpleNamespace(training=True), get_off_policy_mask=f["get_off_policy_mask"],
            get_gamma_weights=lambda **given: _no_grad(f["get_gamma_weights"], given),
        )  # fmt: skip

    f["_compute_loss"].__globals__.update(
        nanmin=lambda x: x[~torch.isnan(x)].min(), nanmax=lambda x: x[~torch.isnan(x)].max()
    )

    def policy(**change: typing.Any) -> typing.Any:
        def run(new: torch.Tensor, d: dict[str, torch.Tensor]) -> torch.Tensor:
            me = trainer(**change)
            me._get_per_token_logps_and_entropies = lambda *a, **k: (new, torch.zeros_like(new), None)
            mask = d["mask"].double()
            inputs = {
                "prompt_ids": torch.zeros((len(mask), 1)), "prompt_mask": torch.ones((len(mask), 1)),
                "completion_ids": torch.zeros_like(mask), "completion_mask": mask,
                "advantages": d["advantages"][:, 0], "old_per_token_logps": d["old"],
                "ref_per_token_logps": d["ref"], "num_items_in_batch": mask.sum(),
            }  # fmt: skip
            if change.get("use_vllm"):
                gap = ((d["old"] - d["rollout"]) * mask).sum(-1, keepdim=True)
                ratio = gap.exp()
                inputs["importance_sampling_ratio"] = ratio.masked_fill(ratio > 3.0, 0.0)
                inputs["sampling_per_token_logps"] = d["rollout"]
            return f["_compute_loss"](me, None, inputs)

        return run

    cases = {
        "trl.grpo": policy(loss_type="grpo"),
        "trl.bnpo": policy(loss_type="bnpo"),
        "trl.dapo": policy(loss_type="dapo"),
        "trl.dr_grpo": policy(loss_type="dr_grpo"),
        "trl.gspo": policy(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4),
        "trl.cispo": policy(loss_type="cispo", epsilon_high=5.0),
        "trl.sapo": policy(loss_type="sapo"),
        "trl.luspo": policy(loss_type="luspo", importance_sampling_level="sequence"),
        "trl.vespo": policy(loss_type="vespo"),
        "trl.grpo delta": policy(loss_type="grpo", delta=4.0),
        "trl.grpo kl": policy(loss_type="grpo", beta=0.04),
        "trl.grpo kl unbiased": policy(loss_type="grpo", beta=0.04, use_bias_correction_kl=True),
        "trl.grpo off-policy mask": policy(loss_type="grpo", off_policy_mask_threshold=0.1),
        "trl.grpo vllm": policy(loss_type="grpo", use_vllm=True, vllm_importance_sampling_correction=True),
        "trl.dapo vllm kl": policy(
            loss_type="dapo", beta=0.04, use_vllm=True, vllm_importance_sampling_correction=True,
            off_policy_mask_threshold=0.1,
        ),
    }  # fmt: skip
    for batch, data in batches().items():
        for case, run in cases.items():
            gold.loss(case, data, run, batch)
    # The advantages are lines of a long method: the `if` over ways to combine rewards, and what follows it.
    method = next(
        n for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.FunctionDef) and n.name == "_generate_and_score_completions"
    )  # fmt: skip
    body = method.body
    at = next(
        i for i, n in enumerate(body) if isinstance(n, ast.If) and "multi_objective_aggregation" in ast.dump(n.test)
    )
    code = compile(ast.Module(body[at : at + 2], []), "<advantages>", "exec")
    for batch, data in batches().items():
        rewards = torch.tensor(data["components"][:8]).clone()
        rewards[2, 0], rewards[5] = torch.nan, torch.nan
        for name, change in {
            "trl.grpo": dict(scale_rewards="group", multi_objective_aggregation="sum_then_normalize"),
            "trl.dr_grpo": dict(scale_rewards="none", multi_objective_aggregation="sum_then_normalize"),
            "trl.batch": dict(scale_rewards="batch", multi_objective_aggregation="sum_then_normalize"),
            "trl.normalize_then_sum": dict(scale_rewards="group", multi_objective_aggregation="normalize_then_sum"),
        }.items():
            me = types.SimpleNamespace(reward_weights=torch.tensor([0.7, 1.3]), reward_funcs=[0, 1], **change)
            space = dict(
                self=me, torch=torch, nanstd=nanstd, rewards_per_func=rewards.clone(), num_generations=4,
                device="cpu", unscorable_mask=torch.isnan(rewards).all(dim=1),
            )  # fmt: skip
            exec(code, space)
            gold.array(f"advantages/{name}", space["advantages"], batch)


def _no_grad(function: typing.Any, given: dict[str, typing.Any]) -> torch.Tensor:
    with torch.no_grad():
        return function(**given)


def slime(place: str, gold: Gold) -> None:
    f = pick(
        source(place, "slime", "slime/utils/ppo_utils.py"),
        ["compute_policy_loss", "compute_cispo_loss", "compute_gspo_kl", "compute_approx_kl"],
        {"torch": torch},
    )
    mean_of = pick(
        source(place, "slime", "slime/backends/megatron_utils/cp_utils.py"),
        ["get_sum_of_sample_mean"],
        {"torch": torch, "mpu": types.SimpleNamespace(get_context_parallel_world_size=lambda: 1)},
    )["get_sum_of_sample_mean"]
    tis = pick(
        source(place, "slime", "slime/backends/megatron_utils/loss.py"),
        ["vanilla_tis_function", "icepop_function"],
        {"torch": torch, "Any": typing.Any},
    )

    def policy(kind: str, correction: str | None = None, low: float = 0.2, high: float = 0.2) -> typing.Any:
        def run(new: torch.Tensor, d: dict[str, torch.Tensor]) -> torch.Tensor:
            masks, old = list(d["mask"].double()), list(d["old"])
            flat = lambda x: torch.cat(list(x))  # noqa: E731
            advantages = flat(d["advantages"])
            kl = f["compute_gspo_kl"](list(new), old, list(new), masks) if kind == "gspo" else flat(old) - flat(new)
            if kind == "cispo":
                loss, _ = f["compute_cispo_loss"](kl, flat(new), advantages, low, high)
            else:
                loss, _ = f["compute_policy_loss"](kl, advantages, low, high)
            if correction is not None:
                args = types.SimpleNamespace(
                    tis_clip=2.0 if correction == "vanilla_tis" else 5.0,
                    tis_clip_low=0.0 if correction == "vanilla_tis" else 0.5,
                )
                loss, _, _ = tis[f"{correction}_function"](
                    args, pg_loss=loss, train_log_probs=old, rollout_log_probs=list(d["rollout"]), loss_masks=masks
                )
            reduce = mean_of([0] * len(masks), [len(m) for m in masks], masks)
            return reduce(loss) / len(masks)

        return run

    cases = {
        "slime.grpo": policy("grpo"),
        "slime.gspo": policy("gspo", low=3e-4, high=4e-4),
        "slime.cispo": policy("cispo"),
        "slime.grpo tis": policy("grpo", "vanilla_tis"),
        "slime.grpo icepop": policy("grpo", "icepop"),
    }
    for batch, data in batches().items():
        for case, run in cases.items():
            gold.loss(case, data, run, batch)


def preferences(place: str, gold: Gold) -> None:
    """TRL's losses of pairs, from sums over tokens; a gradient for every token of both sequences."""
    functional = torch.nn.functional
    text = source(place, "trl", "trl/trainer/dpo_trainer.py")
    loop = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.For) and "loss_types" in ast.dump(n.iter))
    loop.body = [n for n in loop.body if "use_weighting" not in ast.dump(n)]
    code = compile(ast.Module([loop], []), "<dpo>", "exec")
    known = {"torch": torch, "F": functional, "math": math}
    known |= pick(source(place, "trl", "trl/experimental/orpo/orpo_trainer.py"), ["log1mexp"], known)
    cpo = pick(source(place, "trl", "trl/experimental/cpo/cpo_trainer.py"), ["cpo_loss"], known)["cpo_loss"]
    orpo = pick(source(place, "trl", "trl/experimental/orpo/orpo_trainer.py"), ["odds_ratio_loss"], known)
    kto = ast.parse(source(place, "trl", "trl/trainer/kto_trainer.py"))
    method = next(n for n in ast.walk(kto) if isinstance(n, ast.FunctionDef) and n.name == "_compute_loss")
    at = next(i for i, n in enumerate(method.body) if isinstance(n, ast.If) and "calculate_KL" in ast.dump(n.test)
              and "clamp" in ast.dump(n))  # fmt: skip
    kto_code = compile(ast.Module(method.body[at : at + 4], []), "<kto>", "exec")

    rng = np.random.default_rng(9)
    lengths = np.array([[8, 5, 3, 8, 6], [4, 8, 7, 2, 8]])
    mask = np.arange(8) < lengths[..., None]
    logp = np.where(mask, -rng.exponential(1.0, mask.shape) - 0.02, 0)
    ref = np.where(mask, logp + 0.5 * rng.standard_normal(mask.shape), 0)
    gold.out |= {"input/pairs/logp": logp, "input/pairs/ref": ref, "input/pairs/mask": mask}
    counts = torch.tensor(mask.sum(-1).astype(float))

    def dpo(kind: str, smoothing: float) -> typing.Any:
        def run(new: torch.Tensor) -> torch.Tensor:
            both, base = new.sum(-1), torch.tensor(ref).sum(-1)
            me = types.SimpleNamespace(
                loss_types=[kind], loss_weights=[1.0], beta=0.3, label_smoothing=smoothing,
                args=types.SimpleNamespace(discopop_tau=0.05),
            )  # fmt: skip
            flat = torch.tensor(mask.astype(float)).reshape(-1, 8)
            space = known | dict(
                self=me, loss=0.0, device="cpu", completion_mask=flat, shift_completion_mask=flat,
                chosen_logps=both[0], rejected_logps=both[1], ref_chosen_logps=base[0], ref_rejected_logps=base[1],
                chosen_logratios=both[0] - base[0], rejected_logratios=both[1] - base[1],
                chosen_scores=both[0] - base[0], rejected_scores=both[1] - base[1],
                delta_score=(both[0] - base[0]) - (both[1] - base[1]),
            )  # fmt: skip
            exec(code, space)
            return space["loss"]

        return run

    def alone(kind: str, average: bool, nll: float) -> typing.Any:
        def run(new: torch.Tensor) -> torch.Tensor:
            both = new.sum(-1) / counts if average else new.sum(-1)
            me = types.SimpleNamespace(
                alpha=0.0, beta=0.3, label_smoothing=0.0, loss_type=kind, simpo_gamma=0.5,
                accelerator=types.SimpleNamespace(device="cpu"),
            )  # fmt: skip
            likelihood = -new[0][torch.tensor(mask[0])].mean()
            if kind == "odds":
                return nll * likelihood - orpo["odds_ratio_loss"](me, both[0], both[1])[0].mean()
            return cpo(me, both[0], both[1])[0].mean() + nll * likelihood

        return run

    cases = {
        **{kind: dpo(trl_kind, 0.0) for kind, trl_kind in (
            ("sigmoid", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo"), ("nca", "nca_pair"), ("bco", "bco_pair"),
            ("sppo", "sppo_hard"), ("apo_zero", "apo_zero"), ("apo_down", "apo_down"), ("discopop", "discopop"),
            ("averaged", "sigmoid_norm"))},
        "robust": dpo("robust", 0.1),
        "exo": dpo("exo_pair", 0.1),
        "simpo": alone("simpo", True, 0.0),
        "cpo": alone("sigmoid", False, 1.0),
        "orpo": alone("odds", True, 1.0),
    }  # fmt: skip
    for case, run in cases.items():
        new = torch.tensor(logp, requires_grad=True)
        value = run(new)
        (gradient,) = torch.autograd.grad(value, new)
        gold.out[f"pairs/{case}/value"] = value.detach().numpy()
        gold.out[f"pairs/{case}/gradient"] = gradient.numpy()
    for name, kl in (("above", 0.7), ("below", -0.7)):
        new = torch.tensor(logp, requires_grad=True)
        both, base = new.sum(-1), torch.tensor(ref).sum(-1)
        me = types.SimpleNamespace(
            calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5,
            accelerator=types.SimpleNamespace(gather_for_metrics=lambda x: x, device="cpu"),
        )  # fmt: skip
        space = known | dict(
            self=me, chosen_logps=both[0], rejected_logps=both[1], ref_chosen_logps=base[0], ref_rejected_logps=base[1],
            KL_logps=torch.tensor([kl]), ref_KL_logps=torch.tensor([0.0]),
        )  # fmt: skip
        exec(kto_code, space)
        value = space["losses"].sum()
        (gradient,) = torch.autograd.grad(value, new)
        gold.out[f"kto/{name}/value"], gold.out[f"kto/{name}/gradient"] = value.detach().numpy(), gradient.numpy()


def distillation(verl_place: str, trl_place: str, gold: Gold) -> None:
    rng = np.random.default_rng(11)
    student, teacher = 2 * rng.standard_normal((2, 3, 5, 11))
    top = np.argsort(-teacher, -1)[..., :4]
    gold.out |= {"input/logits/student": student, "input/logits/teacher": teacher, "input/logits/top": top}
    known = {"torch": torch, "F": torch.nn.functional}
    jsd = pick(source(trl_place, "trl", "trl/experimental/gold/gold_trainer.py"), ["generalized_jsd_loss"], known)
    kl = pick(source(verl_place, "verl", "verl/trainer/distillation/fsdp/losses.py"), ["kl_divergence"], known)
    t = torch.tensor(teacher)
    picked = torch.gather(t.log_softmax(-1), -1, torch.tensor(top))

    def verl_top(s: torch.Tensor, floor: float | None = None) -> torch.Tensor:
        mine, theirs = torch.gather(s.log_softmax(-1), -1, torch.tensor(top)), picked
        if floor is not None:
            mine, theirs = mine.clamp_min(floor), theirs.clamp_min(floor)
        return kl["kl_divergence"](log_q=mine, log_p=theirs).sum()

    cases = {
        **{f"jsd {beta}": lambda s, b=beta: jsd["generalized_jsd_loss"](s, t, beta=b, temperature=1.7, reduction="sum")
           for beta in (0, 0.3, 1)},
        "top drop": verl_top, "top floor": lambda s: verl_top(s, -2.0),
    }  # fmt: skip
    for case, run in cases.items():
        new = torch.tensor(student, requires_grad=True)
        value = run(new)
        (gradient,) = torch.autograd.grad(value, new)
        gold.out[f"divergence/{case}/value"] = value.detach().numpy()
        gold.out[f"divergence/{case}/gradient"] = gradient.numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name in COMMITS:
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    gold = Gold()
    verl(given.verl, gold)
    trl(given.trl, gold)
    slime(given.slime, gold)
    preferences(given.trl, gold)
    distillation(given.verl, given.trl, gold)
    inputs = {f"input/{b}/{k}": v for b, data in batches().items() for k, v in data.items()}
    np.savez_compressed(HERE / "objectives.npz", **inputs, **gold.out)
    print(f"{len(gold.out)} arrays; torch {torch.__version__}, numpy {np.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
