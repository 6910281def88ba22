"""Published losses with every convention of the code they come from.

Commits: verl 1dda039 (22 Aug 2026), TRL 1.16.0, slime 624b824 (21 Aug 2026). Each is compared with that code, value and
gradient, in tests/rl/test_policy.py. Presets are without KL, entropy and correction unless their name says so; add them
with `dataclasses.replace(PRESETS[...], kl=VERL_KL)`.

Where the frameworks differ: verl bounds log-ratios to +-20 and leaves sequences without a token out of the means; TRL
and slime do neither. verl's dual clip (3.0) is on. verl's GSPO is the token form, TRL's and slime's the sequence's.
verl's CISPO bounds are relative to 1 and inherit PPO's 0.2; TRL's is one absolute bound above, for which its
documentation recommends 5.0 (left unset it would be 0.2). GSPO's clip ranges are the paper's (3e-4, 4e-4).
"""

import difflib
from collections.abc import Mapping

from rl.errors import ObjectiveError
from rl.objectives.aggregate import Aggregate
from rl.objectives.corrections import Correction
from rl.objectives.kl import KL
from rl.objectives.policy import (
    Cispo,
    Clip,
    Divergence,
    Dro,
    GeometricMean,
    KLCov,
    PolicySpec,
    Reinforce,
    Sapo,
    Vespo,
)
from rl.objectives.ratios import Ratio

_VERL, _TRL, _SLIME = "verl 1dda039", "TRL 1.16.0", "slime 624b824"
_BOUNDED, _FREE = Ratio(low=-20.0, high=20.0), Ratio()
_SEQUENCES = Aggregate("sequence_mean_token_mean")
_ALL_SEQUENCES = Aggregate("sequence_mean_token_mean", count_empty=True)

VERL_KL = KL(1e-3, "k3", log_bound=20.0, value_bound=10.0, aggregate=Aggregate())
TRL_KL = KL(0.04, "k3")

TIS = Correction(high=2.0)  # truncated importance sampling of tokens (verl, slime)
TIS_SEQUENCE = Correction(high=2.0, level="sequence")
ICEPOP = Correction(low=0.5, high=5.0, mode="mask")  # two-sided masking of tokens
MIS_SEQUENCE = Correction(high=3.0, mode="mask", level="sequence", log_bound=None)  # TRL's default with vLLM


def _verl(surrogate: object, aggregate: Aggregate = Aggregate(), ratio: Ratio = _BOUNDED) -> PolicySpec:
    return PolicySpec(surrogate, ratio, aggregate, source=_VERL)  # pyright: ignore[reportArgumentType]


def _trl(surrogate: object, aggregate: Aggregate, ratio: Ratio = _FREE) -> PolicySpec:
    return PolicySpec(surrogate, ratio, aggregate, source=_TRL)  # pyright: ignore[reportArgumentType]


def trl_dr_grpo(max_completion_length: int) -> PolicySpec:
    """TRL's Dr. GRPO divides by the configured length of completions, which the batch does not tell."""
    how = Aggregate("sequence_mean_token_sum", divisor=max_completion_length, count_empty=True)
    return _trl(Clip(), how)


PRESETS: Mapping[str, PolicySpec] = {
    "ppo": PolicySpec(Clip()),
    "ppo.dual": PolicySpec(Clip(dual=3.0)),
    "reinforce": PolicySpec(Reinforce()),
    "dapo": PolicySpec(Clip(0.2, 0.28), source="DAPO 2503.14476"),
    "verl.grpo": _verl(Clip(dual=3.0)),
    "verl.dapo": _verl(Clip(0.2, 0.28, dual=3.0)),
    "verl.dr_grpo": _verl(Clip(dual=3.0), Aggregate("sequence_mean_token_sum", divisor="width")),
    "verl.gspo": _verl(Clip(3e-4, 4e-4), _SEQUENCES, Ratio("sequence_token", high=10.0)),
    "verl.cispo": _verl(Cispo(0.8, 1.2)),
    "verl.sapo": _verl(Sapo(), _SEQUENCES),
    "verl.geo_mean": _verl(GeometricMean(0.2, 0.2), _ALL_SEQUENCES, _FREE),
    "verl.gpg": _verl(Reinforce()),
    "verl.dppo_tv": _verl(Divergence("tv")),
    "verl.dppo_kl": _verl(Divergence("kl")),
    "verl.dro": _verl(Dro(), ratio=_FREE),
    "verl.kl_cov": _verl(KLCov(), ratio=_FREE),
    "trl.grpo": _trl(Clip(), _ALL_SEQUENCES),
    "trl.bnpo": _trl(Clip(), Aggregate()),
    "trl.dapo": _trl(Clip(), Aggregate()),
    "trl.dr_grpo": _trl(Clip(), Aggregate("sequence_mean_token_sum", divisor="width", count_empty=True)),
    "trl.gspo": _trl(Clip(3e-4, 4e-4), _ALL_SEQUENCES, Ratio("sequence")),
    "trl.cispo": _trl(Cispo(None, 5.0), Aggregate()),
    "trl.sapo": _trl(Sapo(), _ALL_SEQUENCES),
    "trl.luspo": _trl(Clip(), Aggregate("sequence_mean_token_sum", count_empty=True), Ratio("sequence")),
    "trl.vespo": _trl(Vespo(), Aggregate(), _BOUNDED),
    "slime.grpo": PolicySpec(Clip(), _FREE, _ALL_SEQUENCES, source=_SLIME),
    "slime.gspo": PolicySpec(Clip(3e-4, 4e-4), Ratio("sequence"), _ALL_SEQUENCES, source=_SLIME),
    "slime.cispo": PolicySpec(Cispo(0.8, 1.2), _FREE, _ALL_SEQUENCES, source=_SLIME),
}


def preset(name: str) -> PolicySpec:
    """`PRESETS[name]`.

    Raises:
        ObjectiveError: another name; says the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(PRESETS)}"
    raise ObjectiveError(f"no preset is called {name!r}{hint}")
