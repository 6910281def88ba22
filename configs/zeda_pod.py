"""Presets of `examples/zeda_pod.py`: the released ZEDA runs (2605.18643), on a slice of a TPU pod.

Hyper-parameters are those of the authors' scripts. Ours, because the source is silent or counts otherwise: the slice
and its mesh, how many tokens a row holds, rows a step, the room for a prompt, and clipping.
"""

import dataclasses

from configs import models
from moe.layers.attention import MLAConfig
from moe.layers.moe import MoEConfig
from moe.layers.rotary import RotaryConfig
from moe.models.transformer import TransformerConfig
from moe.routing import RoutingConfig


@dataclasses.dataclass(frozen=True)
class ZedaPod:
    """Conversion and both stages at full size.

    Attributes:
        model: the teacher.
        zero_experts: Z, half of the experts.
        target: share of slots to skip; w = 2 of the paper.
        alpha: of the group loss, summed over layers.
        beta1, beta2, weight_decay: of Adam, both stages.
        clip: global gradient norm, both stages (ours: the scripts do not set it; Megatron's default).
        answers: of the teacher, one each of as many prompts; stage 1 sees them once.
        sft_batch: answers of a step of stage 1.
        sft_rows: packed rows that they fill, assumed for the ahead-of-time compilation; a run takes what they need.
        sft_learning_rate, sft_warmup: stage 1, cosine to 0 after this share of the steps.
        opd_prompts, opd_samples: of a roll-out of stage 2, which is one step.
        opd_steps, opd_learning_rate: stage 2, constant.
        opd_clip: of the ratio, inactive at one step a roll-out.
        temperature: of the roll-outs.
        prompt, response: tokens of a prompt (ours) and of an answer, at most; a row of either stage holds both, so that
            no answer is cut. The paper packs 65,536 tokens a GPU instead.
        topology: of the slice, as `moe.kernels.aot.topology_mesh` names it.
        expert, tensor: devices that experts, and heads with experts' widths, are split over; all others split the
            batch, as do those of `expert`, and the weights.
        chunk: positions whose logits exist at a time, see `moe.objectives.token_loss`.
    """

    model: TransformerConfig
    zero_experts: int
    opd_learning_rate: float
    target: float = 0.5
    alpha: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.1
    clip: float = 1.0
    answers: int = 60_000
    sft_batch: int = 128
    sft_rows: int = 32
    sft_learning_rate: float = 2e-5
    sft_warmup: float = 0.1
    opd_prompts: int = 16
    opd_samples: int = 2
    opd_steps: int = 321
    opd_clip: float = 0.2
    temperature: float = 1.0
    prompt: int = 2_048
    response: int = 32_768
    topology: str = "v5p:2x2x4"
    expert: int = 4
    tensor: int = 1
    chunk: int = 1_024

    def __post_init__(self):
        if self.model.moe is None:
            raise ValueError(f"family {self.model.family!r} has no mixture of experts to convert")
        counts = ("zero_experts", "answers", "sft_batch", "sft_rows", "opd_prompts", "opd_samples", "opd_steps")
        for name in (*counts, "prompt", "response", "expert", "tensor", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.response

    @property
    def sft_steps(self) -> int:
        """Steps of one epoch."""
        return -(-self.answers // self.sft_batch)

    @property
    def opd_rows(self) -> int:
        """Sequences of a roll-out."""
        return self.opd_prompts * self.opd_samples


def qwen3_30b_a3b() -> ZedaPod:
    """Qwen3-30B-A3B: 128 experts and 64 zero experts, 8 slots a token."""
    return ZedaPod(models.qwen3_30b_a3b(), zero_experts=64, opd_learning_rate=5e-6)


def glm_4_7_flash() -> ZedaPod:
    """GLM-4.7-Flash: 64 experts and 32 zero experts, 4 slots a token; its correction bias stays as it is."""
    return ZedaPod(models.glm_4_7_flash(), zero_experts=32, opd_learning_rate=1e-6)


def smoke() -> ZedaPod:
    """The same path in seconds on eight host devices, for tests."""
    model = TransformerConfig(
        family="glm4_moe_lite", vocab=64, width=16, layers=("moe",) * 2, hidden=16,
        attention=MLAConfig(
            heads=2, query_rank=None, latent_rank=8, nope_dim=4, rope_dim=4, value_dim=8,
            rotary=RotaryConfig(4, interleaved=True),
        ),
        moe=MoEConfig(RoutingConfig(4, 2, scoring="sigmoid", selection_bias=True, scaling=1.8), hidden=16, shared=16),
        max_positions=64, bos=1, eos=(2,), pad=0,
    )  # fmt: skip
    return ZedaPod(
        model, zero_experts=2, opd_learning_rate=5e-6, answers=48, sft_batch=16, sft_rows=16, opd_prompts=8,
        opd_steps=3, prompt=6, response=18, expert=2, chunk=12,
    )  # fmt: skip
