import contextlib
import dataclasses
import json

import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks import task_of
from fvq_jax.training import run as run_module
from fvq_jax.training.loop import train as run_loop
from fvq_jax.training.run import CONFIG, HISTORY, check_record, note_start, prepare
from tests.helpers.pictures import write_pictures
from tests.helpers.tiny import tiny_config


def train(config, workdir):
    return run_loop(task_of(config), config, workdir)


def test_a_cpu_is_divided_by_what_is_divided_over_it(monkeypatch):
    asked = []
    monkeypatch.setattr(run_module, "divide_cpu", lambda *args: asked.append(args))
    changes = {"batch_size": 48, "optim.accumulate": 3, "eval.batch_size": 20, "mesh.codebook": 2}
    config = tiny_config(**changes, **{"mesh.cpu_devices": 5})
    run_module.divide_cpu_for(config)
    assert asked == [(5, (-1, 2), (16, 20))]
    with config.unlocked():
        del config.mesh["cpu_devices"]
    run_module.divide_cpu_for(config)  # `validate` says which field is missing
    assert len(asked) == 1


def test_a_bucket_is_no_workdir(tmp_path):
    with pytest.raises(InputError, match="not a local path"):
        train(tiny_config(), "gs://bucket/run")


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"workdir .*file cannot be used"):
        train(tiny_config(), tmp_path / "file")


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="warm-up of 9 steps leaves nothing of the 4 steps"):
        train(tiny_config(**{"optim.warmup_steps": 9}), tmp_path)


def test_what_is_refused_leaves_no_config_behind(tmp_path):
    with pytest.raises(InputError, match="init_from"):
        train(tiny_config(init_from=str(tmp_path / "nothing")), tmp_path / "run")
    assert not (tmp_path / "run" / CONFIG).exists()


FOLDERS, FILES = (
    ("checkpoints", "logs", "heartbeat", "tensorboard", "report"),
    ("config_history.jsonl", "metrics.jsonl"),
)


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_a_file_where_a_run_keeps_a_folder_is_named_and_the_other_way_round(tmp_path, name):
    (tmp_path / name).touch() if name in FOLDERS else (tmp_path / name).mkdir()
    kind = "folder" if name in FOLDERS else "file"
    with pytest.raises(InputError, match=rf"{tmp_path}/{name} is no {kind}, which it is in the workdir of a run"):
        train(tiny_config(), tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_config_of_the_workdir_is_refused(tmp_path, content):
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(InputError, match=r"config\.json is not a config"):
        train(tiny_config(), tmp_path)


def test_a_prepared_run_counts_epochs_in_steps_and_notes_its_config(tmp_path):
    """The bundled photographs are 28,800 crops of this size, 1,800 batches of 16."""
    changes = {"steps": 0, "epochs": 0.5, "optim.warmup_steps": 0, "optim.warmup_epochs": 0.1}
    config = tiny_config(**changes)
    with contextlib.ExitStack() as stack:
        run = prepare(task_of(config), config, tmp_path, stack)
    assert run.total_steps == 900
    assert float(run.step.rate(180)) == pytest.approx(config.optim.learning_rate)
    assert float(run.step.rate(179)) < config.optim.learning_rate
    assert run.data_position(7)["next_step"] == 7
    assert json.loads((tmp_path / CONFIG).read_text())["epochs"] == 0.5


def test_a_run_goes_on_after_what_it_has_named_as_unreadable_has_gone_and_only_then(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", ("a.png", "b.png", "c.png"))
    folder = str(tmp_path / "pictures")
    config = tiny_config(**{"data.source": "folder", "data.train_dir": folder, "data.eval_dir": folder})
    with contextlib.ExitStack() as stack:
        run = prepare(task_of(config), config, tmp_path / "run", stack)

    def go_on(position):
        """With what is in the folder now."""
        now = dataclasses.replace(run, task=task_of(config)(config, run.mesh))
        check_record(now, {"config": json.loads(config.to_json()), "data": json.loads(json.dumps(position))}, 2)

    without_b, whole = run.data_position(2, ["b.png"]), run.data_position(2)
    go_on(whole)
    pictures[1].unlink()
    go_on(without_b)
    with pytest.raises(InputError, match=r"not those .* bring the same ones back, except what this run has named"):
        go_on(whole)
    pictures[2].unlink()
    with pytest.raises(InputError, match="not those"):
        go_on(without_b)


def test_every_start_is_noted_with_what_changed_and_how_the_rate_goes_on(tmp_path, monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(run_module.logging, level, lambda text, *args: lines.append(text % args))

    def start(step, **changes):
        config = tiny_config(**changes)
        with contextlib.ExitStack() as stack:
            note_start(prepare(task_of(config), config, tmp_path, stack), step, {})
        return json.loads((tmp_path / CONFIG).read_text())

    start(0)
    assert lines == []
    saved = start(4, steps=400, **{"log.every_steps": 7})
    assert (saved["steps"], saved["log"]["every_steps"]) == (400, 7)
    assert lines == [
        "changed since the last start: log.every_steps: 2 -> 7",
        "changed since the last start: steps: 4 -> 400",
        "the learning rate goes on at 0.001; with the 4 steps and the settings of the last start it would have been "
        "1e-05",
    ]
    start(4, steps=400, **{"log.every_steps": 2})
    assert len(lines) == 4
    history = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [line["step"] for line in history] == [0, 4, 4]
    assert [(line["devices"], line["device"], line["processes"]) for line in history] == [(8, "cpu", 1)] * 3
    assert [line["changed"] for line in history] == [
        {},
        {"log.every_steps": [2, 7], "steps": [4, 400]},
        {"log.every_steps": [7, 2]},
    ]
