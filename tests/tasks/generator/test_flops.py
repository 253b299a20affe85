import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.gpt import GPT
from fvq_jax.runtime.products import product_flops
from fvq_jax.tasks.generator.flops import layer_flops


@pytest.mark.parametrize("grid", [(3, 4), (10, 13), (16, 16)])  # attention in one block of queries, and in two
def test_flops_of_a_layer_are_those_of_its_products(grid):
    net = GPT(vocab=8, classes=3, grid=grid, layers=2, width=32, heads=4)
    given = np.zeros(5, np.int32), np.zeros((5, net.length), np.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), *map(jnp.asarray, given))
    assert product_flops(jax.make_jaxpr(net.apply)(params, *given)) == net.layers * layer_flops(net, images=5)
