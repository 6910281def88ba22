"""Presets of `examples/train_moe.py`: a small mixture of experts trained from scratch on text and verifiable tasks."""

import dataclasses

from moe.layers.attention import GQAConfig, MLAConfig
from moe.layers.moe import MoEConfig
from moe.layers.rotary import RotaryConfig
from moe.models.transformer import TransformerConfig
from moe.objectives import LossConfig
from moe.routing import RoutingConfig
from moe.tasks import TaskConfig

BOS, EOS, PAD = 0, 1, 2
"""Ids of the tokenizer's special tokens."""


@dataclasses.dataclass(frozen=True)
class Tutorial:
    """One training run.

    Attributes:
        model: its vocab is the size that the tokenizer is trained to.
        loss: router losses; switch=0 where the model balances by bias.
        bias_rate: of the selection bias, for models that have one.
        tasks: problems to learn.
        problems: drawn for training, of each family.
        test_problems: held out, of each family.
        text_share: share of the rows that is text; the others are tasks.
        characters: of text used at most, None for all.
        length: S, positions of a row.
        batch: rows of a step.
        steps: of training.
        learning_rate: peak, after `warmup` steps, of a cosine that ends at a tenth of it.
        weight_decay: of matrices.
        clip: largest norm of a gradient.
        evaluate_every, checkpoint_every, log_every: in steps.
        evaluation_rows: held-out rows of text looked at during training (all of them at the end).
    """

    model: TransformerConfig
    loss: LossConfig = LossConfig()
    bias_rate: float = 1e-3
    tasks: TaskConfig = TaskConfig()
    problems: int = 20_000
    test_problems: int = 100
    text_share: float = 0.5
    characters: int | None = None
    length: int = 128
    batch: int = 16
    steps: int = 1500
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 150
    checkpoint_every: int = 250
    log_every: int = 10
    evaluation_rows: int = 64

    def __post_init__(self):
        if not 0 < self.text_share < 1:
            raise ValueError(f"text_share {self.text_share} must lie between 0 and 1; both sources are trained on")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup {self.warmup} must be shorter than steps {self.steps}")


def _switch(
    *, vocab: int, width: int, layers: int, experts: int, top_k: int, hidden: int, heads: int, length: int
) -> TransformerConfig:
    """Qwen3-MoE's layers: softmax router, renormalised, balanced by the switch loss."""
    head = width // heads
    return TransformerConfig(
        family="qwen3_moe", vocab=vocab, width=width, layers=("moe",) * layers, hidden=hidden,
        attention=GQAConfig(heads, max(1, heads // 2), head, RotaryConfig(head), qk_norm=True),
        moe=MoEConfig(RoutingConfig(experts, top_k), hidden=hidden),
        max_positions=length, bos=BOS, eos=(EOS,), pad=PAD,
    )  # fmt: skip


def default() -> Tutorial:
    """4 layers of 8 experts, 2 a token, balanced by the switch loss."""
    model = _switch(vocab=1024, width=128, layers=4, experts=8, top_k=2, hidden=128, heads=4, length=128)
    return Tutorial(model)


def bias() -> Tutorial:
    """The same size with GLM-4.7-Flash's layers: latent attention, sigmoid router, balanced by selection bias alone."""
    like = default()
    model = dataclasses.replace(
        like.model,
        family="glm4_moe_lite",
        attention=MLAConfig(
            heads=4, query_rank=None, latent_rank=64, nope_dim=16, rope_dim=16, value_dim=32,
            rotary=RotaryConfig(16, interleaved=True),
        ),
        moe=MoEConfig(RoutingConfig(8, 2, scoring="sigmoid", selection_bias=True), hidden=128),
    )  # fmt: skip
    return dataclasses.replace(like, model=model, loss=LossConfig(switch=0.0))


def teacher() -> Tutorial:
    """4 layers of 16 experts, 4 a token, trained until it solves its problems: the teacher of `examples/zeda.py`."""
    model = _switch(vocab=1024, width=128, layers=4, experts=16, top_k=4, hidden=64, heads=4, length=128)
    return Tutorial(
        model, tasks=TaskConfig(largest=12, steps=3), problems=40_000, text_share=0.35, steps=8000, warmup=200,
        evaluate_every=500, checkpoint_every=500,
    )  # fmt: skip


def specialised() -> Tutorial:
    """Goes on from the teacher (`--start`) with no loss on its router, as post-training often does: experts specialise
    and their loads come apart.
    """
    like = teacher()
    return dataclasses.replace(
        like, loss=LossConfig(switch=0.0, router_z=0.0), steps=2000, learning_rate=1e-3, warmup=100
    )


def smoke() -> Tutorial:
    """The same path in seconds, for tests; its scores mean nothing."""
    model = _switch(vocab=320, width=32, layers=2, experts=4, top_k=2, hidden=32, heads=2, length=64)
    return Tutorial(
        model, tasks=TaskConfig(families=("add", "copy", "brackets")), problems=200, test_problems=8,
        characters=60_000, length=64, batch=8, steps=60, warmup=10, evaluate_every=20, checkpoint_every=7, log_every=1,
        evaluation_rows=8,
    )  # fmt: skip
