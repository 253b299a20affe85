import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.runtime import compiled_cost
from fvq_jax.runtime.mesh import make_mesh

# Lines of a program that libtpu compiled, attributes shortened: loops say nothing of their trips, a collective that
# is overlapped with arithmetic stands in several fusions, a fused reduce-scatter is written as an all-reduce, and what
# leaves a slice is handed to the host.
TPU_PROGRAM = """HloModule jit_f, is_scheduled=true

%add (x.3: f32[], y.1: f32[]) -> f32[] {
  %x.3 = f32[]{:T(128)} parameter(0)
  %y.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.2 = f32[]{:T(128)} add(%x.3, %y.1)
}

%condition (wide.param.1: (s32[], f32[256,512])) -> pred[] {
  %constant.49 = s32[]{:T(128)} constant(7)
  %wide.param.1 = (s32[]{:T(128)}, f32[256,512]{1,0:T(8,128)S(1)}) parameter(0)
  %get-tuple-element.253 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.11 = pred[]{:T(512)} compare(%get-tuple-element.253, %constant.49), direction=LT
}

%body (wide.param.2: (s32[], f32[256,512])) -> (s32[], f32[256,512]) {
  %wide.param.2 = (s32[]{:T(128)}, f32[256,512]{1,0:T(8,128)S(1)}) parameter(0)
  %get-tuple-element.3 = f32[256,512]{1,0:T(8,128)} get-tuple-element(%wide.param.2), index=1
  %all-reduce.1 = f32[256,512]{1,0:T(8,128)} all-reduce(%get-tuple-element.3), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}, to_apply=%add
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[256,512]{1,0:T(8,128)S(1)}) tuple(%get-tuple-element.2, %all-reduce.1)
}

%first (param_0.1: f32[512,16]) -> f32[1024,16] {
  %param_0.1 = f32[512,16]{1,0:T(8,128)} parameter(0)
  %all-gather.34 = f32[1024,16]{0,1:T(8,128)} all-gather(%param_0.1), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.5 = (f32[512,16]{0,1:T(8,128)S(1)}, u32[]{:S(2)}) custom-call(%all-gather.34), custom_call_target="AsyncCollectiveStart"
}

%second (param_0.2: f32[512,16]) -> f32[1024,16] {
  %param_0.2 = f32[512,16]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.36 = f32[1024,16]{0,1:T(8,128)} all-gather(%param_0.2), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%products (param_0.3: f32[16,16,2,32], param_1.3: f32[1,1,32,16]) -> f32[16,16,2,16] {
  %param_0.3 = f32[16,16,2,32]{3,1,2,0:T(8,128)} parameter(0)
  %param_1.3 = f32[1,1,32,16]{3,1,2,0:T(8,128)} parameter(1)
  %convert.1 = bf16[1,1,32,16]{3,1,2,0:T(8,128)} convert(%param_1.3)
  %convolution.1 = f32[16,16,2,16]{3,1,2,0:T(8,128)} convolution(%param_0.3, %convert.1), window={size=1x1}, dim_labels=0b1f_01io->0b1f, operand_precision={highest,highest}
  ROOT %convolution.2 = f32[16,16,2,16]{3,1,2,0:T(8,128)} convolution(%param_0.3, %param_1.3), window={size=1x1}, dim_labels=0b1f_01io->0b1f, operand_precision={PRECISION}
}

%all-reduce-scatter (input: f32[512,16]) -> f32[256,16] {
  %input = f32[512,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.156 = f32[512,16]{1,0:T(8,128)} all-reduce(%input), channel_id=170, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %dynamic-slice.114 = f32[256,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.156, %constant.9, %constant.9), dynamic_slice_sizes={256,16}
}

ENTRY %main (param.0: f32[256,512], param.1: f32[512,16]) -> f32[256,512] {
  %param.0 = f32[256,512]{1,0:T(8,128)} parameter(0)
  %param.1 = f32[512,16]{1,0:T(8,128)} parameter(1)
  %tuple.57 = (s32[]{:T(128)}, f32[256,512]{1,0:T(8,128)S(1)}) tuple(%copy.3, %param.0)
  %while.32 = (s32[]{:T(128)}, f32[256,512]{1,0:T(8,128)S(1)}) while(%tuple.57), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %fusion.1 = (f32[512,16]{0,1:T(8,128)S(1)}, u32[]{:S(2)}) fusion(%param.1), kind=kCustom, calls=%first
  %fusion.2 = f32[1024,16]{0,1:T(8,128)} fusion(%param.1), kind=kCustom, calls=%second
  %fusion.3 = f32[16,16,2,16]{3,1,2,0:T(8,128)} fusion(%param.2, %param.3), kind=kOutput, calls=%products
  %fusion.4 = f32[256,16]{1,0:T(8,128)} fusion(%param.1), kind=kCustom, calls=%all-reduce-scatter
  %collective-permute-start.4 = (f32[512,16]{1,0}, f32[512,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%param.1), channel_id=193, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done.4 = f32[512,16]{1,0} collective-permute-done(%collective-permute-start.4)
  %after-all = token[] after-all()
  %send = (f32[512,16]{1,0}, u32[], token[]) send(%param.1, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}"}
  ROOT %get-tuple-element.9 = f32[256,512]{1,0:T(8,128)} get-tuple-element(%while.32), index=1
}
"""  # noqa: E501


def test_collectives_of_a_compiled_program_count_as_often_as_they_run():
    mesh = make_mesh(2, 4)

    def loop(x, _):
        x = jax.lax.psum(x, "data")
        x = jax.lax.all_gather(x, "codebook", tiled=True)
        x = jax.lax.psum_scatter(2 * x, "codebook", tiled=True)
        x = jax.lax.all_to_all(x.reshape(4, -1, 8), "codebook", 0, 0).reshape(-1, 8)
        return jax.lax.ppermute(x, "codebook", [(i, (i + 1) % 4) for i in range(4)]), None

    def step(x):
        x = jax.lax.scan(loop, x, length=5)[0]
        # Of two branches the costlier one counts.
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "data"), lambda x: 2 * x, x)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("codebook"), out_specs=P("codebook"), check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 8), jnp.float32)).compile()
    shard = 64 // 4 * 8 * 4  # bytes
    assert compiled_cost.collective_bytes(compiled_cost.Program(compiled.as_text()), 8) == {
        "all-reduce": 5 * shard + shard,
        "all-gather": 5 * 3 * shard,
        "reduce-scatter": 5 * 3 * shard,  # three of the four shards of what was gathered
        "all-to-all": 5 * shard * 3 // 4,
        "collective-permute": 5 * shard,
    }


def test_a_program_for_a_tpu():
    program = compiled_cost.Program(TPU_PROGRAM)
    latents = 512 * 16 * 4
    assert compiled_cost.collective_bytes(program, 8) == {
        "all-gather": latents,
        "all-reduce": 7 * 256 * 512 * 4 * 2 * 3 // 4,
        "reduce-scatter": latents // 2,
        "all-to-all": 0,
        "collective-permute": latents,
        "between-slices": latents,
    }


@pytest.mark.parametrize(("precision", "more"), [("highest,highest", 5), ("high,high", 2), ("default,default", 0)])
def test_a_product_of_float32_counts_as_its_passes(precision, more):
    program = compiled_cost.Program(TPU_PROGRAM.replace("PRECISION", precision))
    assert compiled_cost.repeated_pass_flops(program) == more * 2 * (16 * 16 * 2 * 16) * 32


def test_a_compiled_product_counts_as_its_passes():
    product = functools.partial(jnp.matmul, precision="highest")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 48))]
    program = compiled_cost.Program(jax.jit(product).lower(*shapes).compile().as_text())
    assert compiled_cost.repeated_pass_flops(program) == 5 * 2 * 64 * 32 * 48


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}, dimensions={0}", 3),
        ("replica_groups=[2,4]<=[8], dimensions={0}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}, use_global_device_ids=true", 8),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}, dimensions={0}", 4),
        ("replica_groups={}, dimensions={0}", 8),
    ],
)
def test_groups_are_read_however_they_are_written(groups, size):
    assert compiled_cost._group_size(f"%x), channel_id=1, {groups}, to_apply=%add.{{clone}}", 8) == size


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.04G) "
            "exceeds available HBM (15.75G).",
            19.04,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.17T of "
            "95.74G hbm. Exceeded hbm capacity by 1.08T.",
            1.17 * 1024,
            95.74,
        ),
    ],
)
def test_what_a_program_that_is_too_large_needs(message, needed, available):
    assert compiled_cost.out_of_memory(message) == (round(needed * 1024**3), round(available * 1024**3))


@pytest.mark.parametrize(
    "message",
    [
        "INVALID_ARGUMENT: 19.04G of HBM and 15.75G",
        "RESOURCE_EXHAUSTED: no sizes of HBM",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.20M of 16.00M vmem.",
    ],
)
def test_other_errors_are_not_taken_for_it(message):
    assert compiled_cost.out_of_memory(message) is None


def test_bytes_of_a_tree_are_those_of_one_device():
    mesh = make_mesh(2, 4)
    rows, whole = NamedSharding(mesh, P("codebook")), NamedSharding(mesh, P())
    tree = {
        "rows": jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=rows),
        "whole": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=whole),
    }
    assert compiled_cost.bytes_per_device(tree) == 64 // 4 * 3 * 4 + 5 * 2


def test_total_bytes_holds_donated_buffers_once():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    kept = jax.jit(lambda x: x + 1).lower(x).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert compiled_cost.total_bytes(kept) - compiled_cost.total_bytes(donated) == 4096


V5E = "TPU v5 lite"  # 197 Tflop/s, 819 GB/s to memory, 200 GB/s to neighbours, 3.125 GB/s to other slices


@pytest.mark.parametrize(
    ("flops", "memory", "sent", "bound", "seconds"),
    [
        (197e12, 409e9, {"all-reduce": 10**10}, "compute", 1.0),
        (19e12, 1638e9, {"all-reduce": 10**10}, "memory", 2.0),
        (19e12, 409e9, {"all-reduce": 3 * 10**11, "all-gather": 3 * 10**11}, "network", 3.0),
        (19e12, 409e9, {"all-reduce": 2 * 10**11, "between-slices": 6_250_000_000}, "network", 3.0),
    ],
)
def test_the_slowest_of_three_bounds_a_step(flops, memory, sent, bound, seconds):
    assert compiled_cost.least_time(V5E, flops, memory, sent) == (bound, pytest.approx(seconds))


@pytest.mark.parametrize("kind", ["cpu", "TPU v4", "NVIDIA A100-SXM4-80GB"])
def test_without_published_figures_there_is_no_estimate(kind):
    assert compiled_cost.least_time(kind, 1e12, 1e9, {}) == (None, None)
