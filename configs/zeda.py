"""Presets of `examples/zeda.py`: a static mixture that learns to skip slots."""

import dataclasses

from configs.moe_tutorial import Tutorial
from configs.moe_tutorial import smoke as smoke_tutorial
from configs.moe_tutorial import teacher as teacher_tutorial


@dataclasses.dataclass(frozen=True)
class Zeda:
    """Conversion, both stages and what they are compared on.

    Attributes:
        tutorial: text, problems and row length; trains the teacher where none is given.
        zero_experts: Z.
        target: share of slots to skip in training; 0.55 there is a little over half of held-out text and problems,
            weighed alike.
        alpha: of the group loss.
        samples: prompts of stage 1, one answer of the teacher each.
        text_share: share of the prompts that are beginnings of texts; the others are problems. An eighth is about the
            teacher's own mixture of tokens, as texts are long.
        test_problems: held-out problems of each family that students are measured on, fewer where a family is small.
        text_prompt: tokens of a text prompt.
        text_tokens: that the teacher (stage 1) or student (stage 2) writes on.
        sft_steps, sft_learning_rate: stage 1: cosine to 0 after a tenth of warm-up.
        sft_form: "nll" of the teacher's answers (the paper's), or "forward_kl" to its whole distribution on them (ours:
            a teacher in the same process gives it at little cost, and it is far less noisy).
        opd_steps, opd_learning_rate: stage 2: constant, one step a roll-out.
        opd_prompts, opd_samples: of a roll-out.
        opd_form: of `moe.distill.FORMS`: the paper's "policy_gradient", or "reverse_kl" with less variance.
        weight_decay, clip: of both stages.
    """

    tutorial: Tutorial
    zero_experts: int = 8
    target: float = 0.55
    alpha: float = 0.1
    samples: int = 12_000
    text_share: float = 0.125
    test_problems: int = 300
    text_prompt: int = 8
    text_tokens: int = 88
    sft_steps: int = 400
    sft_learning_rate: float = 5e-4
    sft_form: str = "forward_kl"
    opd_steps: int = 100
    opd_learning_rate: float = 1e-4
    opd_prompts: int = 16
    opd_samples: int = 2
    opd_form: str = "reverse_kl"
    weight_decay: float = 0.1
    clip: float = 1.0


def default() -> Zeda:
    """The teacher of `configs/moe_tutorial.py`: 16 experts, 4 a token; half of its slots."""
    return Zeda(teacher_tutorial())


def smoke() -> Zeda:
    """The same path in seconds, for tests; its scores mean nothing."""
    return Zeda(
        smoke_tutorial(), zero_experts=3, target=0.4, samples=32, test_problems=8, text_tokens=24, sft_steps=6,
        opd_steps=2, opd_prompts=4,
    )  # fmt: skip
