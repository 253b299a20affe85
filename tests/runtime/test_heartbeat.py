import json

from fvq_jax.runtime.heartbeat import Heartbeat


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_the_file_says_when_which_step_was_done(tmp_path):
    clock = Clock()
    heartbeat = Heartbeat(tmp_path, 3, every=5.0, clock=clock, wall=clock)
    path = tmp_path / "heartbeat" / "host_003.json"
    heartbeat.beat(1, "training")
    assert {"step": 1, "phase": "training", "time": 1000.0}.items() <= json.loads(path.read_text()).items()
    clock.now += 4
    heartbeat.beat(2, "training")
    assert json.loads(path.read_text())["step"] == 1  # not a file per step
    heartbeat.beat(2, "saving")
    assert json.loads(path.read_text())["phase"] == "saving"
    clock.now += 6
    heartbeat.beat(3, "saving")
    assert json.loads(path.read_text())["time"] == 1010.0
    assert [file.name for file in path.parent.iterdir()] == ["host_003.json"]


def test_longest_silence_is_that_since_the_last_look(tmp_path):
    clock = Clock()
    heartbeat = Heartbeat(tmp_path, 0, clock=clock)
    for seconds in (1, 7, 2):
        clock.now += seconds
        heartbeat.beat(1, "training")
    assert heartbeat.longest_silence() == 7
    clock.now += 2
    heartbeat.beat(2, "training")
    assert heartbeat.longest_silence() == 2


def test_a_clock_that_is_set_back_keeps_no_sign_of_life_away(tmp_path):
    clock, wall = Clock(), Clock()
    heartbeat = Heartbeat(tmp_path, 0, every=5.0, clock=clock, wall=wall)
    heartbeat.beat(1, "training")
    clock.now += 6
    wall.now -= 500
    heartbeat.beat(2, "training")
    content = json.loads((tmp_path / "heartbeat" / "host_000.json").read_text())
    assert {"step": 2, "time": 500.0}.items() <= content.items()
    assert heartbeat.longest_silence() == 6
