"""Every benchmark runs at a tiny size in a process of its own, as users start it, and prints JSON."""

import json
import os
import pathlib
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from benchmarks import accelerator, accelerator_parts, cost_growth, limits, llama
from benchmarks.processes import DoesNotFitError, Worker
from fvq_jax.config.checks import validate
from fvq_jax.data.decode import open_image
from fvq_jax.data.transforms import random_resize_crop
from fvq_jax.models.gpt import SIZES, hidden_width
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks import default_config, task_of

ROOT = pathlib.Path(__file__).parents[1]


def run(script, *arguments):
    """The JSON rows it printed, and the other lines."""
    # One device; no optimization of programs that run a few times; PyTorch's threads wait for each other on busy cores.
    changes = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    environment = os.environ | changes
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    return [json.loads(line) for line in lines if line[:1] == "{"], [line for line in lines if line[:1] != "{"]


def test_search_rows_and_table():
    methods = ["fvq_jax", "torch_cdist", "faiss"]
    sizes = ["--codes=48", "--dims=4", "--tokens=32", "--rounds=2"]
    rows, table = run("nearest_code", *sizes, f"--methods={','.join(methods)}", "--markdown")
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert (row["codes"], row["dim"], row["tokens"]) == (48, 4, 32)
        package = {"torch_cdist": "torch", "faiss": "faiss"}.get(row["method"])
        if package and find_spec(package) is None:
            assert row["status"] == f"{package} is not installed"
            continue
        assert row["status"] == ""
        assert row["agreement"] == 1
        assert row["seconds"] > 0
        assert row["ours_over_this"] > 0
        assert row["extra_mib"] >= 0
    assert len(table) == 1 + 2 + len(rows)
    assert table[1].startswith("| codes | dim | method | seconds | ours / this |")


@pytest.mark.slow
def test_a_quantizer_is_timed_beside_the_plain_one():
    rows, table = run("quantizer_step", "--smoke", "--rivals", "bsq", "--rounds=2", "--markdown")
    assert [row["rival"] for row in rows] == ["none", "bsq"]
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["seconds"] > 0
        assert row["ratio"] > 0
        assert row["rounds"] == 2
    assert table[1].startswith("| quantizer | seconds per step | relative to none |")


@pytest.mark.slow
def test_both_steps_are_the_same_network():
    pytest.importorskip("torch")
    tiny = {
        "tokenizer.ch_mult": "(1,)",
        "tokenizer.quantizer.codebook_size": 64,
        "tokenizer.quantizer.bridge": "linear",
    }
    tiny |= {"data.image_size": 16, "adversarial.ndf": 8, "loss.perceptual_weight": 1.0}
    fields = [f"--config.{name}={value}" for name, value in tiny.items()]
    rows, _ = run("train_step", "--config=configs/fvq16k.py:smoke", *fields, "--batch=1", "--rounds=2")
    ours, theirs = rows
    assert (ours["method"], theirs["method"]) == ("fvq_jax", "torch")
    assert ours["parameters"] == theirs["parameters"]
    assert ours["parameters"].keys() == {"tokenizer", "discriminator", "lpips"}
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert len(ours["losses"]) == 4
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"], abs=0.006)
        assert 0 < row["quantizer_share"] < 1
        assert row["peak_mib"] > 0


@pytest.mark.slow
def test_a_quantizer_with_state_is_timed_alone():
    config = ["--config=configs/full_codebook.py:smoke,bridge=none", "--config.tokenizer.ch_mult=(1,)"]
    config += ["--config.eval.images=0", "--config.eval.crops=8", "--config.mesh.cpu_devices=2"]
    (row,), _ = run("train_step", *config, "--methods=fvq_jax", "--batch=2", "--rounds=1")
    assert row["devices"] == 2
    assert row["quantizer_share"] > 0


@pytest.mark.parametrize(
    ("bridge", "published"), [("L/4", "vit:QBridge-L/4"), ("dit-S/2", "dit:QBridge-S/2"), ("none", "none")]
)
def test_the_network_in_pytorch_follows_the_config(bridge, published):
    pytest.importorskip("torch")
    from benchmarks.torch_step import published_network

    config = default_config()
    config.tokenizer.quantizer.bridge = bridge
    network = published_network(config)
    assert (network["bridge"], network["codebook_dim"], network["ch_mult"]) == (published, 256, (1, 1, 2, 2, 4))
    config.optim.ema_decay = 0.9
    with pytest.raises(InputError, match=r"no optim\.ema_decay=0\.9: set it to 0\.0"):
        published_network(config)


@pytest.mark.slow
def test_both_ways_to_load_pictures():
    pytest.importorskip("torch")
    sizes = ["--size=32", "--batch=4", "--pictures=12", "--images=16", "--workers=1", "--rounds=2"]
    rows, table = run("data", *sizes, "--markdown")
    assert [row["method"] for row in rows] == ["folder", "array_record", "torch"]
    for row in rows:
        assert (row["size"], row["batch"], row["workers"], row["status"]) == (32, 4, 1, "")
        assert row["per_core"] == row["images_per_second"] > 0
        assert row["over_torch"] > 0
    assert rows[2]["over_torch"] == 1
    assert table[1].startswith("| method | workers and cores | images / s | per core | over torch |")


@pytest.mark.parametrize(("size", "picture"), [(24, 60), (24, 41)])
def test_the_crops_in_pytorch_are_ours(size, picture, tmp_path, monkeypatch):
    """The same crops from the same random numbers, one picture being halved first."""
    pytest.importorskip("torch")
    from benchmarks import data

    (tmp_path / "3").mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (picture, picture + 9, 3), dtype=np.uint8))
    image.resize((picture + 9, picture)).save(tmp_path / "3/a.jpg", quality=95)
    draw = np.random.default_rng(0)
    monkeypatch.setattr(data.random, "randint", lambda low, high: int(draw.integers(low, high + 1)))
    monkeypatch.setattr(data.random, "random", lambda: 1.0)
    tensor, label = data.TorchFolder(str(tmp_path), size)[0]
    crop = random_resize_crop(open_image(tmp_path / "3/a.jpg"), np.random.default_rng(0), size, size, size * 5 // 4)
    assert label == 3
    expected = crop.astype(np.float32) / 127.5 - 1
    assert np.abs(tensor.numpy().transpose(1, 2, 0) - expected).mean() < 0.01


@pytest.mark.slow
def test_growth_measures_and_draws(monkeypatch, tmp_path):
    """Rows are those of the two scripts above, which are not run again; the picture is made by the script."""

    def search(methods, tokens, codes, dim, rounds, budget):
        sizes = {"tokens": tokens, "codes": codes, "dim": dim}
        return [{"method": m, **sizes, "seconds": 1e-6 * codes, "extra_mib": codes >> 10} for m in methods]

    def step(config, folder, methods, rounds, budget):
        config.data.source = "photos"  # none is read
        validate(config, task_of(config), devices=1)
        codes, dim = config.tokenizer.quantizer.codebook_size, config.tokenizer.quantizer.code_dim
        row = {"method": methods[0], "codes": codes, "dim": dim, "batch": config.batch_size, "seconds": 1.0}
        return [row | {"quantizer_share": 0.5, "peak_mib": 100}]

    monkeypatch.setattr(cost_growth.nearest_code, "compare", search)
    monkeypatch.setattr(cost_growth.train_step, "compare", step)
    rows = list(cost_growth.measure(cost_growth.parse([])))
    assert [row["codes"] for row in rows if "batch" in row] == [4**n for n in range(5, 11)]
    assert {row["batch"] for row in rows if "batch" in row} == {32}
    (tmp_path / "rows").write_text("\n".join(json.dumps(row) for row in rows))
    run("cost_growth", f"--rows={tmp_path}/rows", f"--plot={tmp_path}/plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        width, height = picture.size
    assert width > 2 * height > 400


@pytest.mark.slow
def test_the_search_on_one_chip():
    sizes = ["--codes=100", "--dim=8", "--tokens=16", "--rounds=2", "--least=0.001"]
    rows, table = run("chip_search", *sizes, "--markdown")
    precisions = ("bf16", "bf16_rescored", "bf16_3x", "highest")
    searches = [f"{kind}:{name}" for name in precisions for kind in ("scan", "fvq_jax")]
    assert [row["method"] for row in rows] == ["matmul", *searches, "torch_addmm"]
    for row in rows:
        assert (row["codes"], row["dim"], row["tokens"]) == (100, 8, 16)
        if row["method"] == "torch_addmm" and find_spec("torch") is None:
            assert row["status"] == "torch is not installed"
            continue
        assert row["status"] == ""
        assert row["milliseconds"] > 0
        assert row.get("agreement", 1) >= (0.8 if row["method"].endswith(":bf16") else 1)
        assert ("over_scan" in row) == row["method"].startswith("fvq_jax:")
        assert ("matmul_rate" in row) == (row["method"] in searches)
    assert len(table) == 1 + 2 + len(rows)


@pytest.mark.slow
def test_everything_for_an_accelerator_is_tried(tmp_path):
    """In parts, one of which has no time left; a second call adds to the first."""
    parts = ["versions", "search_262144", "step_fvq16k"]
    rows, _ = run("accelerator", f"--out={tmp_path}", "--tiny", "--budget=280", f"--parts={','.join(parts)}")
    assert [row["part"] for row in rows if row.get("ended") == "done"] == parts
    step = next(row for row in rows if row["part"] == "step_fvq16k")
    assert step["search"] == "highest, auto"
    assert step["images_per_second"] > 0
    assert step["mfu"] > 0
    assert step["program_mib"] > 0
    late, table = run("accelerator", f"--out={tmp_path}", "--tiny", "--budget=1", "--parts=training", "--markdown")
    assert [row["ended"] for row in late] == ["not started: 1 s were left"]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == rows + late
    assert [line for line in table if line.startswith("## ")] == [f"## {name}" for name in [*parts, "training"]]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_training_run_of_a_given_time(tmp_path):
    sizes = ["--size=32", "--batch=4", "--images=8", "--evaluations=2", "--expect=4", "--start=45", "--seconds=75"]
    config = "--config=configs/fvq16k.py:smoke"
    rows, table = run("short_training", config, *sizes, f"--plot={tmp_path}/plot.png", "--markdown")
    assert rows[-1]["step"] == rows[-1]["of_steps"] >= 2
    for row in rows:
        assert 0 < row["usage"] <= 1
        assert row["psnr"] > 0
        assert row["images_per_second"] > 0
        assert row["seconds"] < 75
    assert len(table) == 1 + 2 + len(rows)
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 400


def program_of(text):
    """A part of the benchmark for accelerators that runs this program."""
    return accelerator_parts.Part("search_262144", 60, lambda seconds: ["-c", text])


def test_a_part_that_hangs_or_fails_costs_only_itself(tmp_path, capfd):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    row = "print('{\"codes\": 8}', flush=True); print('not JSON', flush=True)"
    ends = {
        "stopped after 2 s": f"{child}; {row}; import time; time.sleep(60)",
        "failed with exit code 3": f"{row}; sys.exit(3)".replace("print", "import sys; print", 1),
        "done": row,
    }
    for ended, program in ends.items():
        found = []
        with (tmp_path / "log").open("w") as log:
            assert accelerator.run_part(program_of(program), 2, dict(os.environ), found.append, log) == ended
        assert found == [{"codes": 8}]


def test_the_step_avoids_a_kernel_that_failed():
    kernel = {"part": "search_262144", "method": "fvq_jax:highest"}
    scan = {"part": "search_262144", "method": "scan:highest", "agreement": 1.0}
    assert accelerator_parts.kernel_works([])
    assert accelerator_parts.kernel_works([scan, kernel | {"agreement": 1.0}])
    assert not accelerator_parts.kernel_works([scan])  # its time was over before the kernel was tried
    assert not accelerator_parts.kernel_works([scan, kernel | {"status": "failed: of a kernel"}])
    assert not accelerator_parts.kernel_works([scan, kernel | {"agreement": 0.5}])
    memory = {"part": "versions", "memory_gib": 73.5}
    assert accelerator_parts.batch_for([memory]) == accelerator_parts.batch_for([]) == 64
    assert accelerator_parts.batch_for([memory | {"memory_gib": 130}]) == 128


TINY = ["--size=tiny", "--vocab=64", "--classes=5", "--grid=4", "--rounds=2", "--methods=fvq_jax,transformers"]


def has_peer(row):
    """Whether the peer of the generator ran; a row must say why if it did not."""
    if find_spec("torch") and find_spec("transformers"):
        assert row["status"] == ""
        return True
    assert row["status"].endswith(" not installed")
    return False


@pytest.mark.slow
def test_sampling_beside_the_peer_and_the_limit():
    rows, table = run("sampling", *TINY, "--batches=3", "--guidance=2", "--markdown")
    assert [(row["method"], row["batch"]) for row in rows] == [("fvq_jax", 3), ("transformers", 3)]
    for row in rows:
        assert (row["tokens"], row["dtype"], row["guidance"]) == (16, "float32", 2)
        assert row["limit_images_per_second"] > 0
        if row["method"] == "fvq_jax" or has_peer(row):
            assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"], rel=0.02)
            assert row["of_limit"] == pytest.approx(row["images_per_second"] / row["limit_images_per_second"], abs=1e-3)
            assert row["first_seconds"] > 0
            assert row["speedup"] > 0
    assert rows[0]["first_seconds"] > rows[0]["seconds"]  # it compiles
    assert rows[0]["speedup"] == 1
    assert table[1].startswith("| method | batch | images / s | our speed / this | of the limit | bound by |")


@pytest.mark.slow
def test_a_step_of_the_generator_beside_the_peer():
    rows, _ = run("generator_step", *TINY, "--batch=2")
    ours, theirs = rows
    assert ours["parameters"] == theirs["parameters"] == 139_968
    assert ours["first_loss"] == pytest.approx(np.log(64), abs=1e-3)  # the head starts at zero
    for row in rows if has_peer(theirs) else rows[:1]:
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"], rel=0.02)
        assert row["first_loss"] == pytest.approx(np.log(64), abs=0.1)
        assert row["speedup"] > 0


def published_shape(name):
    size = SIZES[name]
    return llama.Shape(name, size.layers, size.width, size.heads, hidden_width(size.width), 16384, 1000, (16, 16))


@pytest.mark.parametrize(
    ("size", "parameters", "read"),
    [("B", 110_888_448, 97.5), ("L", 342_910_976, 325.1), ("XL", 774_699_520, 752.4), ("3B", 3_096_659_200, 3041)],
)
def test_the_limit_counts_the_weights_of_published_sizes(size, parameters, read):
    shape = published_shape(size)
    assert shape.parameters == parameters
    assert limits.weights_read(shape) / 1e6 == pytest.approx(read, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "batch", "rate"), [("L", 1, 11.8), ("L", 128, 263), ("L", 10**7, 315), ("XL", 1, 5.13), ("XL", 128, 135)]
)
def test_memory_limits_a_gpu_as_worked_out_by_hand(size, batch, rate):
    """An A100 of 2.04 TB/s, bfloat16, with guidance."""
    rates = {"memory_bytes_per_second": 2.04e12, "operations_per_second": 1e18}
    found, bound = limits.limit(published_shape(size), "bfloat16", batch, 2, rates)
    assert found == pytest.approx(rate, rel=6e-3)
    assert bound == "memory"


def test_products_of_matrices_limit_large_batches():
    shape, rates = published_shape("L"), {"memory_bytes_per_second": 2.04e12, "operations_per_second": 1e13}
    assert limits.operations_of_image(shape, 2) == pytest.approx(339e9, rel=5e-3)
    assert limits.limit(shape, "bfloat16", 512, 2, rates) == (pytest.approx(1e13 / 339e9, rel=5e-3), "compute")
    without_guidance = limits.limit(shape, "bfloat16", 512, 1, rates)[0]
    assert without_guidance == pytest.approx(2e13 / 339e9, rel=5e-3)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_rates_of_the_machine_are_measured(framework):
    pytest.importorskip(framework)
    rates = limits.load(framework, "float32")()
    for name in limits.RATES:
        assert 1e7 < rates[name]() < 1e13


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers warns of settings of its own
def test_the_peer_decodes_with_its_cache_what_it_computes_without():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = llama.Shape("tiny", 2, 64, 4, 256, 32, 5, (3, 3))
    peer = llama.Peer(shape, "float32")
    codes = torch.arange(3 * 9).reshape(3, 9) % 32
    with torch.inference_mode():
        inputs = peer.inputs(torch.tensor([0, 4, 5]), codes)
        expected = peer.llama(inputs_embeds=inputs, use_cache=False).logits
        cache = transformers.StaticCache(config=peer.config, max_cache_len=9)
        named = {peer.cache_argument: cache}
        steps = [peer.llama(inputs_embeds=each, use_cache=True, **named).logits for each in inputs.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-5)
    sampled = llama.load_sampling(shape, "float32", False, [4], 2.0)()["4"]()
    assert sampled.shape == (4, 9)
    assert 0 <= sampled.min() <= sampled.max() < 32


def too_large():
    """A program for `Worker` that asks for more memory than any machine has free."""
    return lambda: {"run": lambda: bytearray(2**45)}


def failing():
    raise ValueError("of the program")


@pytest.mark.slow
def test_a_program_without_memory_is_a_result_and_a_failing_one_is_not(capfd):
    with pytest.raises(DoesNotFitError, match=r"does not fit in \d+\.\d GiB"):
        Worker("none", too_large)
    with pytest.raises(RuntimeError, match="ended with code 1"):
        Worker("none", failing)
    assert "ValueError: of the program" in capfd.readouterr().err
