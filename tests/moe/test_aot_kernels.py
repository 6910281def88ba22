"""The ahead-of-time tools, and our TPU kernels at the size of Qwen3-30B-A3B's experts, through the real TPU compiler.

Nothing here is run on a TPU: memory, kernels and schedules are the compiler's.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from moe.kernels import aot
from moe.kernels.grouped_matmul import gated_grouped_matmul, grouped_matmul
from tests.benchmarks import tpu_schedule

compiles = [pytest.mark.aot_tpu, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]
ROWS, EXPERTS, MODEL, WIDTH = 32_768, 128, 2_048, 768

# --------------------------------------------------------------------------------------------------
# Parsing


def listing(*bundles):
    return "\n".join(f" {hex(i)}   : > {{ {text} }}" for i, text in enumerate(bundles))


STALL = ("",) * aot._DELAY_SLOTS
# 0: entry; 1-11: a loop that either multiplies (3-7) or skips to 8; then the exit.
TEXT = listing(
    "%s1 = smov 0",
    "%2 = sbr.rel (%p3) target bundleno = 9 (0x9), region = 4",
    *STALL,
    "%5 = vmatmul.bf16.gmra.mxu0 %v6",
    "%7 = vmatmul.bf16.gmra.mxu1 %v6 ;; %8 = vst [vmem:[#allocation3_spill] sm:$0xff] %v9",
    "%9 = vmatmul.bf16.gmra.mxu0 %v6",
    "%s10 = sadd.s32 1, %s1",
    "%11 = sbr.rel (!%p12) target bundleno = 1 (0x1), region = 2",
    *STALL,
    "%s13 = smov 1",
)


def test_schedule_of_a_loop_with_a_branch():
    schedule = aot.Schedule(TEXT)
    assert schedule.cycles == 16
    assert schedule.spills == 1
    (loop,) = schedule.loops
    assert (loop.start, loop.stop, loop.matmuls, loop.inner) == (1, 15, 3, ())
    assert schedule.matmul_blocks() == ((6, 9, 3),)
    body = dict(start=loop.start, stop=loop.stop, trips=lambda loop: 1)
    assert schedule.path(**body) == 14
    assert schedule.path(**body, longest=False) == 11  # the branch and its slots, then the end
    assert schedule.path(**body, avoid=[(6, 9)]) == 11
    with pytest.raises(ValueError, match="no way leads from bundle 1 to 15"):
        schedule.path(**body, avoid=[(6, 9), (9, 10)])
    assert schedule.path(0, 16, trips=lambda loop: 10) == 1 + 10 * 14 + 1
    assert schedule.path(0, 16, trips=lambda loop: 0) == 2


def test_schedule_with_regions_for_targets():
    """Stored bundles name regions instead of bundles."""
    text = TEXT.replace("target bundleno = 9 (0x9), region = 4", "target = $region4")
    text = text.replace("target bundleno = 1 (0x1), region = 2", "target = $region2")
    lines = text.splitlines()
    lines[1] += " /* Start region 2 */"
    lines[9] += " /* Start/End empty region 4 */"
    schedule, wanted = aot.Schedule("\n".join(lines)), aot.Schedule(TEXT)
    assert schedule.loops == wanted.loops
    assert schedule.path(1, 15, trips=lambda loop: 1, longest=False) == 11


def test_text_without_bundles():
    with pytest.raises(ValueError, match="no bundles"):
        aot.Schedule("// nothing here")


COLLECTIVES = """
  %all-reduce.1 = f32[]{:T(128)} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %all-reduce.2 = (bf16[2048,576]{0,1:T(8,128)(2,1)}, bf16[2048,768]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b)
  %reduce-scatter = bf16[512,2048]{1,0:T(8,128)(2,1)} reduce-scatter(%a), dimensions={0}, to_apply=%add
  %start = (f32[8]{0}, /*index=1*/f32[16]{0}) all-gather-start(%a), dimensions={0}
  %done = f32[16]{0} all-gather-done(%start), metadata={op_name="jit(f)/all_gather(x)"}
  ROOT %collective-permute-start.1 = (s32[1]{0}, s32[1]{0}, u32[], u32[]) collective-permute-start(%a)
  %fusion.1 = (f32[8], f32[8]) fusion(%all-reduce.2, %all-to-all.7), kind=kCustom, calls=%all-reduce-scatter.3
  %element = bf16[2048,768] get-tuple-element(%all-reduce.2), index=1
"""


def test_collectives_that_return_tuples_count():
    """Results as libtpu 0.0.42 writes them; what only uses, or is named after, a collective is none."""
    assert aot.count_collectives(COLLECTIVES) == {
        "all-reduce": 2, "reduce-scatter": 1, "all-gather": 1, "collective-permute": 1,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Compiling


@pytest.mark.aot_tpu
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_traffic_counts_the_turns_of_loops():
    """Four chips, [1024, 512]: five all-gathers and reduce-scatters, a sum of [512], a neighbour's quarter."""
    mesh = aot.topology_mesh("v5p:2x2x1", {"space": 4})

    def local(x):
        def body(c, _):
            return lax.psum_scatter(jnp.tanh(lax.all_gather(c, "space", tiled=True)), "space", tiled=True), None

        c, _ = lax.scan(body, x, length=5)
        return lax.ppermute(c, "space", [(i, (i + 1) % 4) for i in range(4)]), lax.psum(jnp.sin(c).sum(0), "space")

    def whole(x):
        return jax.shard_map(local, in_specs=P("space"), out_specs=(P("space"), P()), check_vma=False)(x)

    report = aot.compile_report(whole, mesh, aot.abstract(mesh, (1024, 512), jnp.float32, P("space")))
    size = 1024 * 512 * 4
    assert aot.collective_traffic(report.text) == {
        "all-gather": (5, 5 * size * 3 // 4),
        "reduce-scatter": (5, 5 * size * 3 // 4),
        "all-reduce": (1, 2 * 512 * 4 * 3 // 4),
        "collective-permute": (1, size // 4),
    }


@pytest.mark.aot_tpu
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_report_and_errors():
    mesh = aot.topology_mesh("v5e", {"data": 2, "expert": 2})
    x = aot.abstract(mesh, (8192, 512), jnp.bfloat16, P(("data", "expert")))
    w = aot.abstract(mesh, (512, 4096), jnp.bfloat16, P("data", "expert"))
    report = aot.compile_report(lambda x, w: x @ w, mesh, x, w)
    assert dict(report.collectives) == {"all-gather": 1}
    assert report.kernels == ()
    assert report.argument_bytes == 2 * (8192 * 512 + 512 * 4096) // 4
    assert aot.compile_report(lambda x: x + x, mesh, x).collectives == {}
    with pytest.raises(aot.TpuCompilerError, match="needs 8 devices, v5e:2x2 has 4"):
        aot.topology_mesh("v5e", {"data": 8})
    with pytest.raises(aot.TpuCompilerError, match="no_such_module"):
        aot.compile_schedules("no_such_module:build", "v5e")


def operands(mesh, inner, width, parts):
    rows = aot.abstract(mesh, (ROWS, inner), jnp.bfloat16)
    weights = aot.abstract(mesh, (EXPERTS, *parts, inner, width), jnp.bfloat16)
    sizes = aot.abstract(mesh, (EXPERTS,), jnp.int32)
    return rows, weights, sizes, aot.abstract(mesh, (ROWS, width), jnp.bfloat16)


def backward(function):
    def pulled(rows, weights, sizes, grad):
        return jax.vjp(lambda rows, weights: function(rows, weights, sizes), rows, weights)[1](grad)

    return pulled


LAYERS = {"gate_up": (gated_grouped_matmul, MODEL, WIDTH, (2,)), "down": (grouped_matmul, WIDTH, MODEL, ())}
KERNELS = {
    ("gate_up", "forward"): ("gated_grouped_matmul",),
    ("gate_up", "backward"): ("grouped_matmul", "grouped_matmul_transposed", "grouped_matmul_weights"),
    ("down", "forward"): ("grouped_matmul",),
    ("down", "backward"): ("grouped_matmul_transposed", "grouped_matmul_weights"),
}
QUICK = {("v5e", "gate_up", "backward"), ("v5p", "gate_up", "forward"), ("v6e", "down", "forward")}
EVERY = [
    pytest.param(chip, layer, way, marks=[*compiles, *([] if (chip, layer, way) in QUICK else [pytest.mark.slow])])
    for chip in aot.CHIPS
    for layer, way in KERNELS
]


@pytest.mark.parametrize(("chip", "layer", "way"), EVERY)
def test_kernels_and_temporaries(chip, layer, way):
    """Which kernels, and no array beyond those that the mathematics needs: nothing for the products themselves (an
    operand laid out anew for a kernel would show), gate and up and their gradients for the backward of the gated one.
    """
    mesh = aot.topology_mesh(chip)
    function, inner, width, parts = LAYERS[layer]
    rows, weights, sizes, grad = operands(mesh, inner, width, parts)
    if way == "forward":
        report = aot.compile_report(function, mesh, rows, weights, sizes)
    else:
        report = aot.compile_report(backward(function), mesh, rows, weights, sizes, grad)
    assert sorted(report.kernels) == sorted(KERNELS[layer, way])
    assert not report.collectives
    needed = 2 * 2 * ROWS * 2 * WIDTH if (layer, way) == ("gate_up", "backward") else 0
    assert report.temporary_bytes <= 1.3 * needed + 2e6
    outputs = 2 * (ROWS * width if way == "forward" else ROWS * inner + EXPERTS * inner * width * (2 if parts else 1))
    assert outputs <= report.output_bytes <= 1.001 * outputs


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.slow
@pytest.mark.aot_tpu
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_effective_use_on_v5e():
    """Issue 3, item 3, with the waiting for results counted as cycles (megablox's best tile: 0.73, 0.72, 0.61)."""
    schedule = tpu_schedule.schedules("v5e", "gated")
    for kind, target in {"multinomial": 0.88, "zipf": 0.88, "half": 0.80}.items():
        assert tpu_schedule.our_use("v5e", "gated", schedule.full, kind) >= target
        assert tpu_schedule.our_use("v5e", "gated", schedule.stored, kind) >= target


@pytest.mark.slow
@pytest.mark.aot_tpu
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_effective_use_of_the_backward_on_v5e():
    """To the rows as the forward; to the weights what passes of 128 rows allow (0.82, 0.82, 0.68) but for 1/15."""
    to_rows, to_weights = (tpu_schedule.schedules("v5e", product) for product in ("gate_up_t", "gate_up_weights"))
    for kind, target in {"multinomial": 0.88, "zipf": 0.88, "half": 0.80}.items():
        assert tpu_schedule.our_use("v5e", "gate_up_t", to_rows.full, kind) >= target
        limit = tpu_schedule.passes_bound("v5e", kind)
        assert limit * 14 / 15 <= tpu_schedule.our_use("v5e", "gate_up_weights", to_weights.full, kind) <= limit


@pytest.mark.slow
@pytest.mark.aot_tpu
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_bundles_against_megablox_on_v6e():
    """Visits x bundles, at most 0.85 of megablox's best tile, for every histogram."""
    ours, tile = tpu_schedule.schedules("v6e", "gated"), (128, 2048, 1536)
    theirs = tpu_schedule.megablox_schedules("v6e", tile)
    for kind in tpu_schedule.HISTOGRAMS:
        for view in ("full", "stored"):
            use = tpu_schedule.our_use("v6e", "gated", getattr(ours, view), kind)
            peer = tpu_schedule.megablox_use("v6e", tile, getattr(theirs, view), kind)
            assert peer / use <= 0.85
