import shutil
import sys

import pytest

from fvq_jax.runtime import config_file
from fvq_jax.runtime.config_file import explain, explained, let_import, run_file
from fvq_jax.runtime.errors import InputError
from tests.helpers.program import ROOT


@pytest.fixture(autouse=True)
def _same_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", [name for name in sys.path if name not in ("", str(ROOT))])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("configs", "beside")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("copied", [False, True])
def test_a_shipped_config_is_read_from_anywhere(tmp_path, monkeypatch, copied):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs" / "quickstart.py"
    config = run_file(shutil.copy(path, tmp_path / "mine.py") if copied else path)["get_config"]("smoke")
    assert config.steps == 6


def test_the_configs_of_the_file_s_own_checkout_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, steps in (("here", 1), ("there", 2)):  # the first is where the program is started
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "configs" / "__init__.py").write_text(f"STEPS = {steps}\n")
    sys.path.insert(0, str(tmp_path / "here"))
    (tmp_path / "there" / "configs" / "mine.py").write_text("from configs import STEPS\n")
    assert run_file(tmp_path / "there" / "configs" / "mine.py")["STEPS"] == 2


def test_a_config_may_import_a_file_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("STEPS = 3\n")
    (tmp_path / "mine.py").write_text("from beside import STEPS\n")
    assert run_file(tmp_path / "mine.py")["STEPS"] == 3
    before = list(sys.path)
    let_import(tmp_path / "mine.py")
    assert sys.path == before  # once is enough


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "'(' was never closed (mine.py, line 1: x = ()"),
        ("import fvq_jax.nothing", "No module named 'fvq_jax.nothing' (mine.py, line 1: import fvq_jax.nothing)"),
        ("from fvq_jax.config import none", "cannot import name 'none'"),
        ("a = 1\nb = nme", "NameError: name 'nme' is not defined (mine.py, line 2: b = nme)"),
        ("{}['no']", "no (mine.py, line 1: {}['no'])"),
        ("int('x')", "ValueError: invalid literal for int() with base 10: 'x' (mine.py, line 1: int('x'))"),
        ("1 / 0", "ZeroDivisionError: division by zero (mine.py, line 1: 1 / 0)"),
        ("assert False", "AssertionError (mine.py, line 1: assert False)"),
        ("raise OSError('no\\nfile')", "OSError: no file (mine.py, line 1: raise OSError('no\\nfile'))"),
        ("x = '\0'", "null byte"),
    ],
)
def test_what_a_config_file_raises_is_named_with_its_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError) as caught:
        run_file("mine.py")
    assert str(caught.value).startswith("the config file cannot be used: ")
    assert message in str(caught.value)
    assert "mine.py" in str(caught.value)


@pytest.mark.parametrize(("name", "reason"), [("missing.py", "No such file"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, reason):
    with pytest.raises(InputError, match=f"the config file {tmp_path / name} cannot be read: {reason}"):
        let_import(tmp_path / name)


def test_what_this_package_refuses_explains_itself():
    with pytest.raises(InputError, match=r"^above 0$"), explained("mine.py"):
        raise InputError("above 0")


def test_an_installation_without_configs_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(config_file, "_PACKAGE", tmp_path / "site-packages" / "fvq_jax")
    (tmp_path / "mine.py").write_text("from configs import common\n")
    with pytest.raises(InputError, match=r"No module named 'configs', which is a folder of the checkout .*line 1"):
        run_file(tmp_path / "mine.py")


def test_an_error_that_no_line_raised_names_the_file():
    assert explain(AttributeError("no attribute 'get_config'"), "mine.py").endswith("'get_config' (mine.py)")
