"""Objectives of post-training: composable parts as pure functions, and presets with provenance.

`advantages` says how good samples were, `policy` turns that into a loss from `ratios`, a surrogate, `corrections`, `kl`
and one way to `aggregate`; `presets` pins every convention of published code.
"""

from rl.objectives import distillation as distillation
from rl.objectives.advantages import ESTIMATORS as ESTIMATORS
from rl.objectives.advantages import advantages as advantages
from rl.objectives.advantages import discounted_returns as discounted_returns
from rl.objectives.advantages import gae as gae
from rl.objectives.advantages import token_rewards as token_rewards
from rl.objectives.advantages import whiten as whiten
from rl.objectives.aggregate import Aggregate as Aggregate
from rl.objectives.aggregate import aggregate as aggregate
from rl.objectives.corrections import Correction as Correction
from rl.objectives.corrections import Rejection as Rejection
from rl.objectives.corrections import correction_weights as correction_weights
from rl.objectives.corrections import off_policy_mask as off_policy_mask
from rl.objectives.kl import KL as KL
from rl.objectives.kl import adapted_coefficient as adapted_coefficient
from rl.objectives.kl import kl_estimate as kl_estimate
from rl.objectives.kl import penalised_rewards as penalised_rewards
from rl.objectives.policy import Cispo as Cispo
from rl.objectives.policy import Clip as Clip
from rl.objectives.policy import Divergence as Divergence
from rl.objectives.policy import Dro as Dro
from rl.objectives.policy import GeometricMean as GeometricMean
from rl.objectives.policy import KLCov as KLCov
from rl.objectives.policy import PolicySpec as PolicySpec
from rl.objectives.policy import Reinforce as Reinforce
from rl.objectives.policy import Sapo as Sapo
from rl.objectives.policy import Vespo as Vespo
from rl.objectives.policy import policy_loss as policy_loss
from rl.objectives.policy import policy_objective as policy_objective
from rl.objectives.policy import value_loss as value_loss
from rl.objectives.preference import PREFERENCES as PREFERENCES
from rl.objectives.preference import Preference as Preference
from rl.objectives.preference import kto_loss as kto_loss
from rl.objectives.preference import preference_loss as preference_loss
from rl.objectives.preference import preference_objective as preference_objective
from rl.objectives.presets import PRESETS as PRESETS
from rl.objectives.presets import preset as preset
from rl.objectives.presets import trl_dr_grpo as trl_dr_grpo
from rl.objectives.ratios import Ratio as Ratio
from rl.objectives.ratios import log_ratio as log_ratio
