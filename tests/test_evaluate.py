import functools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fvq_jax import evaluate
from fvq_jax.data.decode import open_image
from fvq_jax.data.evaluation_set import Sample
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.prepare import main as prepare
from fvq_jax.data.transforms import center_no_resize, resize_center
from fvq_jax.evals import reconstruction
from fvq_jax.evals.frechet import frechet_distance
from fvq_jax.evals.networks import Networks
from fvq_jax.evals.protocol import as_scored
from fvq_jax.evaluate.options import parse
from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.frozen.inception import CLASSES
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.report.tokenizer import page, write_report
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.processes import Place
from fvq_jax.tasks import default_config
from tests.helpers.hanging_picture import with_hanging_picture
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.slow_cases import slow
from tests.helpers.trained_workdir import trained_workdir
from tests.helpers.two_hosts import ROOT, free_port, on_two_hosts, start_host

pytestmark = pytest.mark.usefixtures("no_drawing")

TOKENIZERS = functools.cache(Tokenizer.from_pretrained)
SIZE = 16
PICTURES = 11


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tok"
    Tokenizer(random_tokenizer(bridge="none")).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """The tokenizer of an earlier test, with its compiled programs; no page, which takes seconds to draw."""
    monkeypatch.setattr(evaluate.Tokenizer, "from_pretrained", TOKENIZERS)
    monkeypatch.setattr(evaluate, "write_report", lambda folder, report: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of several sizes, one smaller than the crop."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        height, width = ((20, 31), (16, 16), (12, 40))[i % 3]
        noise = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{i:02}.png")
    return folder


def features(images):
    """Stands in for InceptionV3, which is tested by itself: a few numbers, and the logits, of each picture."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    rng = np.random.default_rng(0)
    return {
        "64": (flat @ rng.normal(size=(flat.shape[1], 64))).astype(np.float32),
        "logits_unbiased": (flat @ rng.normal(size=(flat.shape[1], CLASSES))).astype(np.float32),
    }


@pytest.fixture
def with_inception(monkeypatch, tmp_path):
    """Options that name a weight file, which is only hashed: `features` is InceptionV3."""

    def load(files, size):
        return Networks(None if files["inception"] is None else features, {}, {})

    monkeypatch.setattr(evaluate, "load_networks", load)
    monkeypatch.setattr(reconstruction, "RFID_FEATURES", 64)
    (tmp_path / "inception.pth").write_bytes(b"weights")
    return [f"--inception={tmp_path / 'inception.pth'}", f"--reference-cache={tmp_path / 'cache'}"]


def run(capsys, *options):
    code = evaluate.main([str(option) for option in options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out), captured.err


def by_hand(saved, folder, protocol):
    """Crops and reconstructions as scored, and codes, one picture after the other."""
    tok = Tokenizer.from_pretrained(saved)
    crop = resize_center if protocol == "direct" else center_no_resize
    crops = np.stack([crop(open_image(path), SIZE) for path in sorted(folder.iterdir())])
    codes = tok.encode(crops)
    decoded = np.round((tok.decode(codes).astype(np.float64) + 1) * 127.5).astype(np.uint8)
    return as_scored(crops, protocol), as_scored(decoded, protocol), codes


def order_of(folder):
    """Of the pictures by name, as they are scored."""
    source = FolderSource(folder)
    return [Sample(source, len(source)).index(position) for position in range(len(source))]


def test_levels_with_codes_of_their_own_are_scored_by_those(folder, tmp_path, capsys, monkeypatch):
    saved = random_tokenizer(bridge="none")
    own = ResidualQuantizer(codebook_size=64, code_dim=8, bridge="none", depth=2, shared_codebook=False)
    Tokenizer(SavedTokenizer(saved.net.clone(quantizer=own), saved.params)).save_pretrained(tmp_path / "tok")
    pages = []
    monkeypatch.setattr(evaluate, "write_report", lambda folder, report: pages.append(page(report)))
    metrics, _ = run(
        capsys, f"--tokenizer={tmp_path}/tok", f"--data={folder}", f"--size={SIZE}", f"--out={tmp_path}/out"
    )
    assert metrics["bits_per_pixel"] == 2 * 5 / 4  # two codes of 32 for four pixels
    codes = Tokenizer.from_pretrained(tmp_path / "tok").encode(by_hand(tmp_path / "tok", folder, "direct")[0])
    for level in range(2):
        assert metrics[f"usage/level_{level + 1}"] == len(np.unique(codes[..., level])) / 32
    assert "2 levels of 32 codes each" in pages[0]
    assert "Each level has 32 codes of its own" in pages[0]


@pytest.mark.parametrize("protocol", ["direct", "published"])
def test_pixel_metrics_and_code_statistics(protocol, saved, folder, tmp_path, capsys, monkeypatch):
    """Eleven pictures in batches of eight: five rows of padding that must not count."""
    monkeypatch.setattr(evaluate, "write_report", write_report)
    report, err = run(
        capsys,
        f"--tokenizer={saved}",
        f"--data={folder}",
        f"--out={tmp_path / 'out'}",
        f"--protocol={protocol}",
        f"--size={SIZE}",
        "--batch=8",
        "--save-npz",
    )
    assert f"evaluating ({protocol}): 100%" in err
    assert err.index("fvq_jax: not computed: rfid: ") < err.index("evaluating")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    assert report["usage_by_position"] == [pytest.approx(report["usage"])]
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert f"protocol <b>{protocol}</b>" in page
    assert f"{report['psnr']:.2f}" in page
    real, decoded, codes = by_hand(saved, folder, protocol)
    pairs = list(zip(real / 255, decoded / 255, strict=True))
    expected = {
        "psnr": np.mean([peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]),
        "ssim": np.mean(
            [
                structural_similarity(
                    x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
                )
                for x, y in pairs
            ]
        ),
        "l1": np.mean(np.abs(real / 255 - decoded / 255)),
        "mse": np.mean(np.square(real / 255 - decoded / 255)),
    }
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, abs=1e-4), name
    counts = np.bincount(codes.reshape(-1), minlength=64)
    assert report["usage"] == pytest.approx(np.mean(counts > 0))
    assert report["dead_codes"] == np.sum(counts == 0)
    assert report["tokens"] == codes.size == PICTURES * 64
    assert report["perplexity"] == pytest.approx(2 ** report["entropy_bits"], rel=1e-4)
    assert report["bits_per_pixel"] == 6 / 4
    assert (report["images"], report["skipped_files"], report["size"]) == (PICTURES, 0, SIZE)
    assert report["enlarged_pictures" if protocol == "direct" else "framed_pictures"] == 3
    assert ("rfid" in report["biased"]) == ("rfid" in report)
    assert report["protocol"] == protocol
    with np.load(tmp_path / "out" / "reconstructions.npz") as file:
        assert file.files == ["arr_0"]
        written = file["arr_0"].astype(int)
    assert np.abs(written - decoded[order_of(folder)]).mean() < 0.05  # two programs may round a value apart
    assert set(report["not_computed"]) == {"rfid", "inception_score", "lpips_vgg", "lpips_alex"}
    assert "rfid" not in report
    assert "pass --inception=FILE" in report["not_computed"]["rfid"]
    assert "pass --lpips-vgg=FILE" in report["not_computed"]["lpips_vgg"]
    assert report["not_computed"]["lpips_alex"] == f"needs pictures of at least 31 pixels, not {SIZE}"


def test_rfid_and_its_cached_reference(with_inception, saved, folder, tmp_path, capsys):
    options = [f"--tokenizer={saved}", f"--out={tmp_path / 'out'}", f"--size={SIZE}", "--batch=8", *with_inception]
    first, _ = run(capsys, *options, f"--data={folder}")
    real, decoded, _ = by_hand(saved, folder, "direct")
    expected = frechet_distance(features(real)["64"], features(decoded)["64"])
    assert expected > 1
    assert first["rfid"] == pytest.approx(expected, rel=1e-5)
    assert 1 <= first["inception_score"] <= 2  # splits of one or two pictures
    assert not first["reference"]["cached"]
    assert "rfid" not in first["not_computed"]

    again, _ = run(capsys, *options, f"--data={folder}")
    assert again["reference"] == {"path": first["reference"]["path"], "cached": True}
    assert again["rfid"] == pytest.approx(first["rfid"], rel=1e-9)
    with open(first["reference"]["path"], "r+b") as file:
        file.truncate(1000)  # half written by something else
    repaired, _ = run(capsys, *options, f"--data={folder}")
    assert not repaired["reference"]["cached"]
    assert repaired["rfid"] == again["rfid"]


def test_scores_are_kept_if_the_page_cannot_be_written(saved, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "write_report", write_report)
    (tmp_path / "report").write_text("not a folder")
    assert evaluate.main([f"--tokenizer={saved}", f"--data={folder}", f"--out={tmp_path}", f"--size={SIZE}"]) == 2
    assert "report" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == PICTURES


def test_prepared_pictures_score_as_their_folder(saved, folder, tmp_path, capsys):
    assert prepare([str(folder), str(tmp_path / "prepared")]) == 0
    capsys.readouterr()
    options = [f"--tokenizer={saved}", f"--size={SIZE}", f"--out={tmp_path / 'out'}"]
    ours, _ = run(capsys, *options, f"--data={tmp_path / 'prepared'}")
    theirs, _ = run(capsys, *options, f"--data={folder}")
    assert ours["psnr"] == pytest.approx(theirs["psnr"], rel=1e-6)
    assert ours["pictures"] != theirs["pictures"]


def test_other_tokenizers_are_scored_on_the_same_pictures(saved, folder, tmp_path, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(evaluate, "write_report", lambda folder, report: written.append(report))
    other, namesake = tmp_path / "other", tmp_path / "again/other"
    Tokenizer(random_tokenizer(1, bridge="none", codebook_size=16)).save_pretrained(other)
    shutil.copytree(other, namesake)
    options = [f"--size={SIZE}", f"--data={folder}", f"--out={tmp_path / 'out'}"]
    alone, _ = run(capsys, f"--tokenizer={other}", *options)
    both, _ = run(capsys, f"--tokenizer={saved}", f"--compare={other},{saved},{namesake}", *options)
    second, third, fourth = both["compared"]
    assert [second["path"], third["path"], fourth["path"]] == [str(other), str(saved), str(namesake)]
    for name in ("psnr", "usage", "quantization_error", "perplexity"):
        assert second[name] == pytest.approx(alone[name], rel=1e-6)
        assert third[name] == pytest.approx(both[name], rel=1e-6)
    assert second["psnr"] != third["psnr"]
    report = written[-1]
    text = page(report)
    assert text.count(f'<td title="{saved}">') == 1  # the first is "this one"
    for path in (other, namesake):  # as much of the path as tells them from each other
        assert f'<td title="{path}">{path.parent.name}/other</td><td class="text">16 ' in text
    shown = [example.position for example in report.found.examples.spread]
    assert [example.position for example in report.compared[0].spread] == shown
    assert written[0].compared == []
    assert "Side by side" not in page(written[0])


def test_random_crops_are_called_so(saved, folder, tmp_path, capsys):
    options = [f"--tokenizer={saved}", f"--size={SIZE}", f"--out={tmp_path / 'out'}", f"--data={folder}"]
    report, _ = run(capsys, *options, "--crops=30", "--seed=4", "--protocol=published")
    assert (report["images"], report["different_pictures"]) == (30, PICTURES)
    expected = "30 random crops as in training, seed 4; crops and reconstructions scored after JPEG of quality 75"
    assert report["protocol_means"] == expected


def test_some_images_of_the_bundled_photographs(saved, tmp_path, capsys):
    options = [f"--tokenizer={saved}", "--data=photos", f"--out={tmp_path}", f"--size={SIZE}", "--batch=8"]
    report, _ = run(capsys, *options, "--images=5")
    assert report["images"] == 5


def test_a_weight_file_that_is_not_there_is_refused(saved, folder, tmp_path, capsys):
    options = [f"--tokenizer={saved}", f"--data={folder}", f"--out={tmp_path}", f"--size={SIZE}"]
    assert evaluate.main([*options, f"--inception={tmp_path / 'none.pth'}"]) == 2
    assert f"fvq_jax: --inception: there is no file '{tmp_path / 'none.pth'}'" in capsys.readouterr().err
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size=15"], "tok: images of 15 x 15 pixels do not fit the down-sampling of 2"),
        (["--size=16", "--compare=,"], "argument --compare: names no tokenizer"),
        (["--size=16", "--batch=0"], "--batch must be at least 1"),
        (["--size=16", "--images=-1"], "--images, --crops and --seed at least 0"),
        (["--size=16", "--seed=3"], "--seed is that of random crops: leave it out, or add --crops=N"),
        (["--size=16", "--data=photos", "--crops=9"], "--crops does not go with the bundled photographs"),
        (["--size=16", "--inception=PICTURE"], "is damaged or not written by torch.save"),
        (["--size=16", "--l2_norm=true"], "l2_norm=True contradicts"),
        (["--size=16", "--out=PICTURE"], "cannot write to"),
        (["--size=16", "--workdir=PICTURE"], "not allowed with argument"),
    ],
)
def test_bad_options_exit_2_with_one_line(options, message, saved, folder, tmp_path, capsys):
    options = [option.replace("PICTURE", str(folder / "00.png")) for option in options]
    try:
        code = evaluate.main([f"--tokenizer={saved}", f"--data={folder}", f"--out={tmp_path / 'out'}", *options])
    except SystemExit as exit:  # argparse
        code = exit.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_what_a_workdir_says(tmp_path):
    assert evaluate._config_of_run(tmp_path) is None
    (tmp_path / "config.json").write_text('{"tokenizer": {}}')  # of a saved tokenizer
    assert evaluate._config_of_run(tmp_path) is None
    (tmp_path / "config.json").write_text('{"data": {"image_size": 48, "eval_dir": "there"}, "eval": {"images": 7}}')
    config = evaluate._config_of_run(tmp_path)
    assert (config.data.image_size, config.data.eval_dir, config.eval.images) == (48, "there", 7)
    (tmp_path / "config.json").write_text('{"data": {"image_sise": 48}}')
    with pytest.raises(InputError, match=r"is not the config of a run of this version.*image_sise"):
        evaluate._config_of_run(tmp_path)


def test_pictures_that_a_workdir_names_are_cropped_and_counted_as_asked(folder):
    config = default_config()
    config.data.source, config.data.eval_dir, config.data.image_size = "folder", str(folder), 256
    source, data = evaluate._source(None, SIZE, 5, config)
    assert (len(source), data) == (PICTURES, str(folder))
    config.data.source = "photos"
    source, _ = evaluate._source(None, SIZE, 5, config)
    assert len(source) == 5
    with pytest.raises(InputError, match="--data=FOLDER is missing"):
        evaluate._source(None, SIZE, 0, None)


def test_processes_are_joined_if_asked_for(saved, folder, tmp_path, monkeypatch, capsys):
    def join(place):
        raise InputError(f"no others at {place.coordinator} for {place.timeout} s")

    monkeypatch.setattr(Place, "join", join)
    options = [f"--workdir={saved}", f"--data={folder}", f"--out={tmp_path}"]
    assert evaluate.main([*options, "--distributed", "--coordinator=host:1", "--distributed_timeout=7"]) == 2
    assert capsys.readouterr().err == "fvq_jax: no others at host:1 for 7 s\n"


def test_two_hosts_share_the_pictures_and_find_what_one_finds(saved, with_inception, folder, tmp_path, monkeypatch):
    """Eleven pictures, four at a time on each: 7 of 4 and 3, and 4 of 4 and none."""

    def arguments(out):
        options = [f"--tokenizer={saved}", f"--data={folder}", f"--out={out}", f"--size={SIZE}", "--batch=8"]
        return parse([*options, *with_inception, "--save-npz"])

    reports = {}
    monkeypatch.setattr(evaluate, "write_report", lambda folder, report: reports.update({folder.name: report}))
    whole = evaluate.evaluate(arguments(tmp_path / "one"))
    shutil.rmtree(tmp_path / "cache")  # so that the statistics are collected again
    results = on_two_hosts(monkeypatch, lambda index: evaluate.evaluate(arguments(tmp_path / f"host{index}")))
    assert results[1] == {}
    assert set(reports) == {"one", "host0"}
    assert results[0].keys() == whole.keys()
    for name, value in whole.items():
        if isinstance(value, float):
            assert results[0][name] == pytest.approx(value, rel=1e-4), name
        elif name != "reference":
            assert results[0][name] == value, name
    assert not results[0]["reference"]["cached"]
    with (
        np.load(tmp_path / "one" / "reconstructions.npz") as one,
        np.load(tmp_path / "host0" / "reconstructions.npz") as two,
    ):
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
    one, two = (reports[name].found for name in ("one", "host0"))
    np.testing.assert_array_equal(one.first_use, two.first_use)
    for kind in ("spread", "worst", "best"):
        for ours, theirs in zip(getattr(one.examples, kind), getattr(two.examples, kind), strict=True):
            assert (ours.position, ours.name) == (theirs.position, theirs.name)
            np.testing.assert_array_equal(ours.reconstruction, theirs.reconstruction)


@pytest.mark.slow
def test_two_processes_write_once_what_one_writes(saved, folder, tmp_path, capsys):
    """Four pictures at a time in each, so that one process and two run the same programs on the same batches."""
    options, port = [f"--tokenizer={saved}", f"--data={folder}", f"--size={SIZE}", "--save-npz"], free_port()
    two = ["-m", "fvq_jax.evaluate", *options, "--batch=8", "--distributed"]
    hosts = [start_host(index, 2, port, *two, f"--out={tmp_path / f'host{index}'}") for index in range(2)]
    outputs = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert "psnr" not in outputs[1][0]
    assert list((tmp_path / "host1").iterdir()) == []
    divided = json.loads((tmp_path / "host0" / "metrics.json").read_text())
    assert json.loads(outputs[0][0].splitlines()[-1]) == divided
    whole, _ = run(capsys, *options, "--batch=4", f"--out={tmp_path / 'one'}")
    assert divided.keys() == whole.keys()
    for name, value in whole.items():
        assert divided[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    with (
        np.load(tmp_path / "one" / "reconstructions.npz") as one,
        np.load(tmp_path / "host0" / "reconstructions.npz") as both,
    ):
        assert one["arr_0"].shape == (PICTURES, SIZE, SIZE, 3)
        np.testing.assert_array_equal(both["arr_0"], one["arr_0"])


@pytest.mark.slow
def test_pictures_that_stop_coming_end_the_program_with_one_line_and_exit_1(folder, tmp_path):
    """Opening one hangs, for longer than the run of this workdir waits."""
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    trained_workdir(run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["timeout"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder, pictures)
    shutil.copy(pictures / "00.png", pictures / "11.png")
    last = sorted(path.name for path in pictures.iterdir())[order_of(pictures)[-1]]
    options = [f"--workdir={run}", f"--data={pictures}", f"--out={tmp_path / 'out'}", f"--size={SIZE}", "--batch=8"]
    command = [sys.executable, *with_hanging_picture(last, "fvq_jax.evaluate"), *options, "--save-npz"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1, ended.stderr
    beginnings = ("evaluating", "fvq_jax: not computed")
    (line,) = (line for line in ended.stderr.splitlines() if line and not line.startswith(beginnings))
    assert re.match(r"fvq_jax: no batch for (0|2)\.5 s: ", line)  # the longer for the first, on a busy machine
    assert ended.stdout == ""
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("restart_after", [16.0, *slow(0.0)])
def test_bridge_and_usage_by_position_of_a_run(restart_after, folder, tmp_path, capsys, monkeypatch):
    """Also if its quantizer keeps state, so that only the table it makes is loaded."""
    written = []
    monkeypatch.setattr(evaluate, "write_report", lambda folder, report: written.append(report))
    saved = trained_workdir(tmp_path / "run", restart_after=restart_after)
    options = [f"--workdir={tmp_path / 'run'}", f"--data={folder}", f"--out={tmp_path / 'out'}", f"--size={SIZE}"]
    report, _ = run(capsys, *options, f"--compare={tmp_path / 'run'}")
    assert page(written[0]).count("codes, bridge XS/2, ") >= 4  # title, heading, and a row for each
    assert "codes, bridge XS/2, " in report["tokenizer"]
    assert len(report["usage_by_position"]) == 4
    assert min(report["usage_by_position"]) == report["positions/usage_min"]
    assert np.mean(report["usage_by_position"]) == pytest.approx(report["usage"])
    moved = Tokenizer.from_pretrained(tmp_path / "run").codebook - Tokenizer(saved).codebook
    np.testing.assert_allclose(moved, float(restart_after > 0), atol=1e-5)


def test_random_crops_of_a_run_are_the_default_of_its_pictures(folder, tmp_path, capsys):
    trained_workdir(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"] |= {"source": "folder", "eval_dir": str(folder)}
    config["eval"] |= {"images": 0, "crops": 21}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    size = config["data"]["image_size"]

    def scored(*options):
        report, _ = run(capsys, f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", *options)
        return report["random_crops"], report["images"], report["pictures"].partition(",")[0]

    assert scored() == (21, 21, f"21 crops of {size} pixels")
    assert scored("--crops=7", "--seed=1") == (7, 7, f"7 crops of {size} pixels")
    for whole in ("--images=5", f"--data={folder}", f"--size={size + 2}"):
        crops, images, pictures = scored(whole)
        assert (crops, images) == (0, 5 if "images" in whole else PICTURES)
        assert " crops of " not in pictures


def test_weights_that_give_no_numbers_are_refused(saved, folder, tmp_path, capsys, monkeypatch):
    whole = Tokenizer.reconstruct

    def broken(tokenizer, images, labels):
        found = whole(tokenizer, images, labels)
        return found._replace(images=np.full_like(found.images, np.nan))

    monkeypatch.setattr(Tokenizer, "reconstruct", broken)
    options = [f"--tokenizer={saved}", f"--data={folder}", f"--out={tmp_path}", f"--size={SIZE}", "--batch=8"]
    assert evaluate.main(options) == 2
    assert "are not finite: its weights are broken" in capsys.readouterr().err


@pytest.mark.parametrize("condition", ["label", *slow("null")])
def test_a_tokenizer_with_classes_is_given_labels_or_null(condition, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "in" / str(label)).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / str(label) / f"{number}.png")
    tokenizer = Tokenizer(random_tokenizer(bridge="dit-XS/2-c3"))
    tokenizer.save_pretrained(tmp_path / "classes")
    options = [f"--tokenizer={tmp_path / 'classes'}", f"--data={tmp_path / 'in'}", f"--size={SIZE}"]
    result, _ = run(capsys, *options, f"--condition={condition}", f"--out={tmp_path / 'out'}", "--batch=4")
    labels = np.repeat(np.arange(3), 2) if condition == "label" else "null"
    crops = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "in").glob("*/*.png"))])
    decoded = tokenizer.decode(tokenizer.encode(crops, labels), labels).astype(np.float64)
    decoded = np.round((decoded + 1) * 127.5).astype(np.uint8)
    scores = [peak_signal_noise_ratio(*pair) for pair in zip(crops, decoded, strict=True)]
    assert result["psnr"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert result["condition"] == condition


def test_a_condition_that_does_not_fit_is_one_line(saved, folder, tmp_path, capsys):
    Tokenizer(random_tokenizer(bridge="dit-XS/2-c3")).save_pretrained(tmp_path / "classes")
    options = [f"--data={folder}", f"--size={SIZE}", f"--out={tmp_path / 'out'}"]
    assert evaluate.main([f"--tokenizer={tmp_path / 'classes'}", *options]) == 2
    assert "a bridge with classes: give --condition=label" in capsys.readouterr().err
    assert evaluate.main([f"--tokenizer={saved}", "--condition=null", *options]) == 2
    assert "--condition=null is for a tokenizer whose bridge has classes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_condition_is_for_those_of_several_tokenizers_that_have_classes(saved, folder, tmp_path, capsys):
    Tokenizer(random_tokenizer(bridge="dit-XS/2-c3")).save_pretrained(tmp_path / "classes")
    options = [f"--data={folder}", f"--size={SIZE}", f"--out={tmp_path / 'out'}", "--condition=null"]
    both, _ = run(capsys, f"--tokenizer={saved}", f"--compare={tmp_path / 'classes'}", *options)
    alone, _ = run(capsys, f"--tokenizer={tmp_path / 'classes'}", *options)
    assert both["condition"] == "none"
    assert both["compared"][0]["psnr"] == pytest.approx(alone["psnr"], rel=1e-6)
