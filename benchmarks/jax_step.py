"""Our training step of the tokenizer for the benchmarks; for `train_step.py` the quantizer alone too."""

import time
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from benchmarks.processes import MIB
from fvq_jax.tasks import task_of
from fvq_jax.tasks.tokenizer.fields import downsampling

LOSSES = ("reconstruction", "codebook", "commitment", "perceptual")  # compared between the programs


class CompiledStep(NamedTuple):
    """A step and what it is called with: `step(init(key), batch, task.frozen)` gives a state and metrics."""

    task: Any
    abstract: Any  # the state, as shapes
    batch: Any
    init: Any
    step: Any
    jaxpr: Any
    compile_seconds: float  # of `step`


def compiled_step(config: ConfigDict, mesh: Any, images: np.ndarray) -> CompiledStep:
    """Compiles the step of a config for images, uint8 [b, H, W, 3]."""
    import jax

    from fvq_jax.runtime.mesh import global_batch
    from fvq_jax.training.step import TrainStep

    task = task_of(config)(config, mesh)
    train_step = TrainStep.of(task, config, mesh, total_steps=1000, warmup_steps=100)
    abstract, batch = train_step.abstract(), global_batch({"image": images}, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(train_step.init, out_shardings=layout).lower(jax.random.key(config.seed)).compile()
    traced = train_step.jitted(abstract).trace(abstract, batch, task.frozen)
    began = time.monotonic()
    step = traced.lower().compile()
    return CompiledStep(task, abstract, batch, init, step, traced.jaxpr, time.monotonic() - began)


def load(config: ConfigDict, folder: str) -> Any:
    """Our step; see `processes.py` for what is returned. Leaves its first tokenizer in `folder`, for the other step."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from fvq_jax.interop.tokenizer_checkpoint import write_checkpoint
    from fvq_jax.runtime import chips, compiled_cost
    from fvq_jax.runtime.allocation import keep_memory
    from fvq_jax.runtime.mesh import BATCH, make_mesh
    from fvq_jax.runtime.products import product_flops
    from fvq_jax.training.run import divide_cpu_for

    keep_memory()  # this and the next line as fvq_jax.main does
    divide_cpu_for(config)
    if jax.default_backend() == "cpu":
        config.tokenizer.dtype = "float32"
        mesh = make_mesh(config.mesh.data, config.mesh.codebook)
    else:
        mesh = make_mesh(1, 1, jax.devices()[:1])
    images, latent = inputs(config)
    latent = jax.device_put(latent, NamedSharding(mesh, BATCH))
    ours = compiled_step(config, mesh, images)
    task, abstract, step = ours.task, ours.abstract, ours.step

    def quantizer_loss(params, variables, latent):
        found = task.net.apply(
            {"params": {"quantizer": params}, **variables}, latent, method=lambda net, x: net.quantizer(x)
        )
        weighted = sum(weight * found.losses[name] for name, weight in task.net.quantizer.loss_weights.items())
        return weighted + jnp.sum(found.vectors)  # the sum stands for what the decoder makes of the vectors

    needed, there = compiled_cost.total_bytes(step), chips.memory_bytes(jax.devices()[0])
    if needed > there:
        raise MemoryError(f"the step needs {needed} bytes of {there}")
    quantizer = jax.jit(jax.grad(quantizer_loss, argnums=(0, 2)))
    network = abstract.networks["tokenizer"]
    quantizer = quantizer.lower(network.params.get("quantizer", {}), network.variables, latent).compile()
    counted = {"flops": product_flops(ours.jaxpr), "peak_flops": chips.peak_flops(jax.devices()[0], task.dtype)}
    counted |= {
        "devices": mesh.size,
        "program_mib": round(needed / MIB),
        "compile_seconds": round(ours.compile_seconds, 1),
    }
    parameters = {name: _size(network.params) for name, network in abstract.networks.items()}
    parameters |= {name: _size(weights) for name, weights in task.frozen.items()}

    def build():
        state, first = ours.init(jax.random.key(config.seed)), {}
        params = state.networks["tokenizer"].params
        if "quantizer" in params:
            params["quantizer"] = _spread(params["quantizer"])
        if folder:
            write_checkpoint(f"{folder}/tokenizer.safetensors", "fvq", task.net, params)

        def run_step():
            nonlocal state
            state, metrics = jax.block_until_ready(step(state, ours.batch, task.frozen))
            for name in LOSSES:
                if f"loss/{name}" in metrics.scalars:
                    first.setdefault(name, float(metrics.scalars[f"loss/{name}"]))

        def run_quantizer():
            network = state.networks["tokenizer"]
            jax.block_until_ready(quantizer(network.params.get("quantizer", {}), network.variables, latent))

        return {
            "step": run_step,
            "quantizer": run_quantizer,
            "losses": lambda: first,
            "parameters": lambda: parameters,
            "counted": lambda: counted,
            "device": lambda: jax.devices()[0].device_kind,
        }

    return build


def inputs(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8 [b, H, W, 3], and latents for the quantizer alone, float32 [b, h, w, d]."""
    rng, size = np.random.default_rng(0), config.data.image_size
    grid = size // downsampling(config)
    images = rng.integers(0, 256, (config.batch_size, size, size, 3), np.uint8)
    return images, rng.standard_normal((config.batch_size, grid, grid, config.tokenizer.quantizer.code_dim), np.float32)


def _spread(quantizer):
    """Makes bridged codes differ, as they do after a few steps: at first all of them are zero."""
    import jax

    def spread(path, leaf):
        is_last = "recover" in jax.tree_util.keystr(path) and leaf.ndim == 2
        return leaf + 0.02 * jax.random.normal(jax.random.key(0), leaf.shape) if is_last else leaf

    return jax.tree.map_with_path(spread, quantizer)


def _size(tree):
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))
