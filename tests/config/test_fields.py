import re

import pytest

from fvq_jax.config.checks import all_fields
from fvq_jax.config.fields import SHARED, make_config
from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.names import dotted
from fvq_jax.tasks import TASKS, default_config


def test_a_config_is_made_of_fields_with_their_defaults():
    config = make_config({"size": Field(3, "Size."), "optim.b1": Field(0.9, "b1."), "net.mult": Field((1, 2), "mult.")})
    assert config.to_dict() == {"size": 3, "optim": {"b1": 0.9}, "net": {"mult": (1, 2)}}


@pytest.mark.parametrize("section", ["", "optim"])
def test_a_config_takes_no_field_that_it_was_not_made_of(section):
    config = make_config({"size": Field(3, "Size."), "optim.b1": Field(0.9, "b1.")})
    with pytest.raises(AttributeError, match="b3"):
        (config[section] if section else config).b3 = 1


@pytest.mark.parametrize("task", TASKS)
def test_the_default_config_of_a_task_has_exactly_its_fields(task):
    config = default_config(task)
    assert config.task == task
    assert dotted(config).keys() == all_fields(TASKS[task]).keys()
    assert all_fields(TASKS[task]).keys() > SHARED.keys()


@pytest.mark.parametrize("task", TASKS)
def test_every_default_is_allowed_and_every_field_explained_in_whole_sentences(task):
    for name, field in all_fields(TASKS[task]).items():
        field.check(name, field.default)
        assert re.fullmatch(r"[A-Z].*\.", field.text), name


@pytest.mark.parametrize("task", TASKS)
def test_no_task_redefines_a_shared_field(task):
    assert not TASKS[task].fields().keys() & SHARED.keys()
