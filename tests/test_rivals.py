"""configs/rivals.py: every quantizer once, and nothing else differs."""

import pathlib

import pytest

from configs import rivals
from configs.ablations import usage_recovery
from fvq_jax.models.quantizers import QUANTIZERS, make_quantizer
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import dotted
from fvq_jax.sweep.points import make_points, read_sweep

FILE = str(pathlib.Path(rivals.__file__))


def test_every_quantizer_takes_part_with_as_many_codes():
    assert {name for name, _ in rivals.RIVALS.values()} == set(QUANTIZERS)
    for name, settings in rivals.RIVALS.values():
        assert make_quantizer({"name": name, **settings}).size == rivals.CODES


def on_folder(module, size, folder):
    """What makes the config of a point, with a folder that exists where it trains on one."""

    def with_argument(argument):
        config = module.get_config(size + argument)
        if config.data.source == "folder":
            config.data.train_dir = config.data.eval_dir = str(folder)
        return config

    return with_argument


@pytest.mark.parametrize("size", ["", "smoke,"])
def test_the_sweep_takes_every_rival_with_every_seed_and_all_can_run(size, tmp_path):
    with_argument = on_folder(rivals, size, tmp_path)
    sweep = read_sweep(f"{FILE}:seeds=2")
    points = make_points(rivals.get_config(), sweep, pathlib.Path("sweep"), None, with_argument)
    assert [point.refused for point in points] == [""] * 2 * len(rivals.RIVALS)
    assert len({point.name for point in points}) == len(points)


def test_only_the_quantizer_differs_and_for_stablevq_the_rate_of_its_codebook():
    base = dotted(rivals.get_config("rival=none"))
    for rival in rivals.RIVALS:
        changed = dotted(rivals.get_config(f"rival={rival}"))
        names = {name for name in base.keys() & changed.keys() if base[name] != changed[name]}
        others = {name for name in names if not name.startswith("tokenizer.quantizer.")}
        assert others == ({"optim.codebook_learning_rate"} if rival == "stablevq" else set())


def test_an_unknown_rival_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match="unknown rival 'vqgan': use one of none, ema"):
        rivals.get_config("rival=vqgan")


@pytest.mark.parametrize("size", ["", "smoke,"])
def test_usage_recovery_takes_every_quantizer_at_every_scale(size, tmp_path):
    with_argument = on_folder(usage_recovery, size, tmp_path)
    sweep = read_sweep(usage_recovery.__file__)
    points = make_points(usage_recovery.get_config(), sweep, pathlib.Path("sweep"), None, with_argument)
    assert [point.refused for point in points] == [""] * 20
    configs = [point.config for point in points]
    assert [config["tokenizer.quantizer.init_std"] for config in configs] == [*usage_recovery.SCALES] * 4
    assert [config["tokenizer.quantizer.name"] for config in configs] == ["simvq"] * 5 + ["vector"] * 15
    windows = [config.get("tokenizer.quantizer.region_window", 0) for config in configs]
    assert windows == [0] * 10 + [usage_recovery.WINDOW] * 5 + [0] * 5
    restarts = [config.get("tokenizer.quantizer.restart_after", 0) for config in configs]
    assert restarts == [0] * 15 + [usage_recovery.RESTART] * 5
    if not size:  # every window has 65,536 tokens
        assert {config["log.every_steps"] * config["batch_size"] * 64 for config in configs} == {65536}


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match="unknown kind 'fsq': use one of simvq, fvq, region, restart"):
        usage_recovery.get_config("kind=fsq")
