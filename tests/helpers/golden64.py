"""What this package computes for the golden cases, in float32 as users have it and in float64 beside it.

Float32 rounds differently on every kind of processor, and the published numbers are a float32 run themselves. So they
are compared with our float64, where only the published run's own rounding is left, and our float32 with our float64.

Float64 takes a process of its own, which imports `widen.py` before anything else. Weights and pictures are the
float32 numbers that the published run was given.
"""

import functools
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.interop.discriminator import patchgan_from_torch
from fvq_jax.interop.gpt_layout import gpt_params, gpt_tensors
from fvq_jax.interop.layouts.fvq import FVQ
from fvq_jax.interop.layouts.quantizer_names import quantizer_name
from fvq_jax.interop.lpips import lpips_params
from fvq_jax.interop.torch_arrays import from_torch
from fvq_jax.models.frozen.lpips import VGG16, lpips_distance
from fvq_jax.models.gpt import GPT
from fvq_jax.models.quantizers.multi_scale import MultiScaleQuantizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.ops.adversarial import discriminator_loss, generator_loss
from fvq_jax.ops.token_loss import token_nll
from fvq_jax.runtime.names import flatten, nest
from fvq_jax.training.state import NetworkState, TrainState
from tests.helpers.golden_case import load_case
from tests.helpers.quick_compile import FLAGS
from tests.helpers.tiny import make_step, tiny_config

ROOT = pathlib.Path(__file__).parents[2]
# Column of the published log, and the scalar it is here.
COLUMNS = {
    "lr": "learning_rate",
    "rec": "loss/reconstruction",
    "vq": "loss/codebook",
    "commit": "loss/commitment",
    "gen_adv": "loss/adversarial",
    "gen_total": "loss/total",
    "gen_grad_norm": "grad_norm/tokenizer",
    "disc_total": "loss/discriminator",
    "disc_grad_norm": "grad_norm/discriminator",
}


@functools.cache
def in_float32(name: str) -> dict[str, np.ndarray]:
    """The results of a case as everyone computes them, by published names and in PyTorch's layout."""
    return compute(name)


@functools.cache
def in_float64(name: str) -> dict[str, np.ndarray]:
    """The same results from a process in which float32 means float64."""
    # One device. Of the other flags, those that compile small programs faster compile these twice as long; the rest, a
    # user's choice of instructions among them, are those of this process.
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in FLAGS]
    flags += ["--xla_force_host_platform_device_count=1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "results.npz")
        program = f"import tests.helpers.widen; from tests.helpers.golden64 import save; save({name!r}, {path!r})"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"{name} in float64: {done.stderr}")
        with np.load(path) as file:
            return dict(file)


def compute(name: str) -> dict[str, np.ndarray]:
    """The results of a case in the precision of this process."""
    results = PROGRAMS[name](name)
    return {key: np.asarray(value) for key, value in results.items()}


# How far PyTorch's float32 is from its own float64 by `rounding_errors`: the root mean square of five roundings
# (`torch_golden.py`; torch 2.13, AMD EPYC). Single roundings are a matter of luck: at fvq_vit the five gradients
# are 0.5e-3 to 2.7e-3 away.
PYTORCH_ROUNDING = {
    "fvq_vit": {"forward": 1.9e-6, "gradients": 1.5e-3},
    "fvq_dit": {"forward": 1.8e-6, "gradients": 0.8e-3},
    "fvq_linear": {"forward": 1.9e-6, "gradients": 1.2e-3},
    "llamagen_l2": {"forward": 2.0e-6, "gradients": 0.28e-3},
}
# What a float32 network may be away from its float64, as a multiple of that.
ALLOWED = 4


def rounding_errors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest `relative_norm` of a tokenizer's outputs, and of the gradients of its parameters."""
    outputs = ("latent", "codebook", "quantized", "reconstruction")
    gradients = {key: value for key, value in expected.items() if key.startswith("grad/") and value.any()}
    errors = []
    for key, value in gradients.items():
        # Biases of keys, and those that a norm of one channel per group takes away again, have gradient zero in exact
        # arithmetic: what is left is measured by the same layer's weights.
        least = 1e-3 * np.linalg.norm(gradients[key.replace(".bias", ".weight")])
        errors.append(np.linalg.norm(actual[key] - value) / max(np.linalg.norm(value), least))
    return {
        "forward": max(relative_norm(actual[key], expected[key]) for key in outputs),
        "gradients": float(max(errors)),
    }


def summation_error(terms: int) -> float:
    """Relative error to expect of a float32 sum of so many numbers, one after the other: a walk of random roundings."""
    return terms**0.5 * 2**-24


def save(name: str, path: str) -> None:
    """Writes the results of a case, as `in_float64` reads them."""
    np.savez(path, **compute(name))


def relative_norm(actual: np.ndarray, expected: np.ndarray) -> float:
    """Euclidean length of the error over that of the expected array: unlike the largest error, an average."""
    return float(np.linalg.norm(np.ravel(actual) - np.ravel(expected)) / np.linalg.norm(expected))


def published_net(config):
    """The network that a config of the published code describes."""
    quantizer = VectorQuantizer(
        codebook_size=config["codebook_size"],
        code_dim=config["codebook_dim"],
        bridge=config["bridge"].replace("dit:", "dit-").replace("vit:", "").replace("QBridge-", ""),
        l2_normalize=config["l2_norm"],
        search_implementation=_search(),
        commitment_weight=config["commit_loss_beta"],
        entropy_weight=float(config["entropy_loss_ratio"]) or 1e-30,  # the term is wanted, whatever its weight
        entropy_temperature=config["entropy_temperature"],
    )
    return TokenizerNet(
        quantizer,
        ch=config["ch"],
        ch_mult=tuple(config["ch_mult"]),
        num_res_blocks=config["num_res_blocks"],
        z_channels=config["z_channels"],
    )


def _search():
    # The kernels, which no CPU runs but which are traced all the same, have no float64.
    return "xla" if jax.config.jax_enable_x64 else "auto"


def _wide(tree):
    """The same numbers in the precision of this process."""
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def _channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def tokenizer(name):
    """Outputs and losses of a forward pass, and the gradient of the total loss by every parameter (`grad/*`)."""
    case = load_case(name)
    net, images = published_net(case.config), _wide(case.images())

    def parts(net, images):
        return net(images), net.encode_latent(images), net.table()

    def loss(params):
        output, latent, table = net.apply({"params": params}, images, method=parts)
        terms = output.quantized.losses
        losses = {
            "vq_loss": terms["codebook"],
            "commit_loss": case.config["commit_loss_beta"] * terms["commitment"],
            "entropy_loss": case.config["entropy_loss_ratio"] * terms["entropy"],
        }
        losses["loss"] = jnp.mean(jnp.square(output.reconstruction - images)) + sum(losses.values())
        return losses["loss"], (output, losses, latent, table)

    params = _wide(FVQ.params(case.weights, net, name))
    gradient, (output, losses, latent, table) = jax.jit(jax.grad(loss, has_aux=True))(params)
    return {
        "latent": _channels_first(latent),
        "codebook": table,
        "indices": output.quantized.codes.reshape(len(images), -1),
        "quantized": _channels_first(output.quantized.vectors),
        "reconstruction": _channels_first(output.reconstruction),
        **losses,
        **{f"grad/{key}": value for key, value in FVQ.tensors(net, gradient).items()},
    }


def quantizer_alone(name):
    """Vectors, codes and losses of a quantizer with levels; the gradient of mean(vectors^2) and both losses, by
    latents (`grad_z`) and every parameter (`grad/*`).
    """
    case = load_case(name)
    quantizer = published_levels(case.config)
    z = _wide(case.images("z"))
    made = jax.eval_shape(quantizer.init, jax.random.key(0), z)["params"]
    params = nest(
        {path: from_torch(path, case.weights[quantizer_name(path)], leaf.shape) for path, leaf in flatten(made).items()}
    )

    def loss(params, z):
        output = quantizer.apply({"params": params}, z)
        terms = {"vq_loss": output.losses["codebook"]}
        terms["commit_loss"] = case.config["commit_loss_beta"] * output.losses["commitment"]
        return jnp.mean(jnp.square(output.vectors)) + sum(terms.values()), (output, terms)

    (gradient, grad_z), (output, terms) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(_wide(params), z)
    return {
        "codes": output.codes.reshape(case.outputs["codes" if "codes" in case.outputs else "indices"].shape),
        "quantized": _channels_first(output.vectors),
        "grad_z": _channels_first(grad_z),
        **terms,
        **{f"grad/{quantizer_name(path)}": value for path, value in flatten(gradient).items()},
    }


def published_levels(config):
    """The quantizer with levels that a config of the published code describes."""
    common = {
        "codebook_size": config["codebook_size"],
        "code_dim": config["codebook_dim"],
        "bridge": config["bridge"].replace("dit:QBridge", "dit"),
        "search_implementation": _search(),
    }
    if "levels" in config:
        return ResidualQuantizer(**common, depth=config["levels"])
    return MultiScaleQuantizer(**common, scales=tuple(config["scales"]), phi_count=config["share_quant_resi"])


def lpips(name):
    """Distances, and the gradient of their sum by the second images."""
    case = load_case(name)
    params = _wide(lpips_params(case.weights, VGG16, name, name))
    a, b = _wide((case.images("a"), case.images("b")))

    @jax.jit
    def distance_and_gradient(params, a, b):
        distance, pullback = jax.vjp(lambda b: lpips_distance(params, a, b, dtype=a.dtype), b)
        return distance, pullback(jnp.ones_like(distance))[0]

    distance, gradient = distance_and_gradient(params, a, b)
    return {"distance": distance, "grad_b": _channels_first(gradient)}


def adversarial(name):
    """The losses of the discriminators."""
    case = load_case(name)
    real, fake = _wide((case.inputs["real"], case.inputs["fake"]))
    return {
        "hinge_d": discriminator_loss("hinge", real, fake),
        "vanilla_d": discriminator_loss("vanilla", real, fake),
        "hinge_g": generator_loss("hinge", fake),
    }


def published_step(case):
    published, model = case.config, case.config["model"]
    assert model["bridge"] == "vit:QBridge-S/4"
    config = tiny_config(
        **{
            "batch_size": published["batch"],
            "data.image_size": published["image_size"],
            "tokenizer.ch": model["ch"],
            "tokenizer.ch_mult": tuple(model["ch_mult"]),
            "tokenizer.num_res_blocks": model["num_res_blocks"],
            "tokenizer.attention_levels": (-1,),
            "tokenizer.z_channels": model["z_channels"],
            "tokenizer.quantizer.codebook_size": model["codebook_size"],
            "tokenizer.quantizer.code_dim": model["codebook_dim"],
            "tokenizer.quantizer.bridge": "S/4",
            "tokenizer.dtype": _wide(0.0).dtype.name,
            "tokenizer.quantizer.search_implementation": _search(),
            "loss.reconstruction": published["reconstruction"],
            "tokenizer.quantizer.commitment_weight": model["commit_loss_beta"],
            "adversarial.weight": published["disc_weight"],
            "adversarial.start": published["disc_start"],
            "adversarial.ndf": published["disc_ndf"],
            "adversarial.layers": 3,
            "optim.learning_rate": published["lr"],
            "optim.b1": published["betas"][0],
            "optim.b2": published["betas"][1],
            "optim.clip_norm": published["max_grad_norm"],
            "optim.hold": published["hold"],
            "optim.ema_decay": published["ema_decay"],
        }
    )
    mesh = jax.make_mesh(
        (1, 1), ("data", "codebook"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )
    return make_step(config, mesh, published["steps"], published["warmup"])


def published_state(step, case):
    """The state at step 0 with the golden weights."""

    def state(params, critic):
        variables = {"tokenizer": {}, "discriminator": {"batch_stats": critic["batch_stats"]}}
        networks = {
            name: NetworkState(params, step.optimizers[name].init(params), variables[name])
            for name, params in (("tokenizer", params), ("discriminator", critic["params"]))
        }
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, networks, ema=jax.tree.map(jnp.copy, params))

    params = FVQ.params(case.weights_of("model."), on_one_device(step.task.net), "training_run")
    critic = patchgan_from_torch(case.weights_of("discriminator."))
    return jax.jit(state)(*_wide((params, critic)))


def on_one_device(net):
    """The network without its mesh."""
    return net.clone(quantizer=net.quantizer.clone(mesh=None))


def training_run(name):
    """The published columns of every step, and what the last and the averaged weights reconstruct."""
    case = load_case(name)
    step = published_step(case)
    net, start = on_one_device(step.task.net), published_state(step, case)
    layout = jax.tree.map(lambda leaf: leaf.sharding, step.abstract())
    run = jax.jit(step.__call__, out_shardings=(layout, None))
    weights = {"commit": case.config["model"]["commit_loss_beta"], "disc_total": case.config["disc_weight"]}
    state, rows = jax.device_put(start, layout), []
    for images in np.moveaxis(case.inputs["images"], 2, -1):
        if jax.config.jax_enable_x64:
            # The step turns pixels into [-1, 1] itself: these are the ones that become what float32 made of them.
            images = (np.asarray(images.astype(np.float32) / 127.5 - 1, np.float64) + 1) * 127.5
        state, metrics = run(state, {"image": images}, {})
        rows.append([weights.get(column, 1) * metrics.scalars[scalar] for column, scalar in COLUMNS.items()])
    x = _wide(case.images("images")[0, :1])
    reconstruct = jax.jit(lambda params: net.apply({"params": params}, x).reconstruction)
    return {
        "rows": jnp.array(rows),
        "final_reconstruction": _channels_first(reconstruct(state.networks["tokenizer"].params)),
        "ema_reconstruction": _channels_first(reconstruct(state.ema)),
    }


def generator(name):
    """Logits, the mean loss, and its gradient by every parameter (`grad/*`)."""
    case = load_case(name)
    net = published_generator(case.config)
    labels, codes = (jnp.asarray(case.inputs[key], jnp.int32) for key in ("labels", "indices"))

    @jax.jit
    def run(params):
        def loss(params):
            hidden = net.apply({"params": params}, labels, codes)
            return token_nll(hidden, params["output"], codes, dtype=net.dtype)[0].mean()

        return net.apply({"params": params}, labels, codes, method="logits"), *jax.value_and_grad(loss)(params)

    logits, loss, gradient = run(_wide(gpt_params(case.weights, net)))
    grads = {f"grad/{key}": value for key, value in gpt_tensors(net, gradient).items()}
    return {"logits": logits, "loss": loss, **grads}


def published_generator(config):
    """The generator that a config of the published code describes."""
    side = math.isqrt(config["block_size"])
    return GPT(
        vocab=config["vocab_size"],
        classes=config["num_classes"],
        grid=(side, side),
        layers=config["n_layer"],
        width=config["dim"],
        heads=config["n_head"],
        class_dropout=config["class_dropout_prob"],
        rope_base=float(config["rope_base"]),
        eps=config["norm_eps"],
    )


PROGRAMS = {
    **dict.fromkeys(("fvq_vit", "fvq_dit", "fvq_linear", "llamagen_l2"), tokenizer),
    **dict.fromkeys(("rq", "var_multiscale"), quantizer_alone),
    "lpips_vgg16": lpips,
    "adversarial_losses": adversarial,
    "training_run": training_run,
    "llamagen_gpt": generator,
}
