"""Command lines of the programs that read a config: absl flags, with errors in one line."""

import os
import re
import sys

import jax
from absl import flags
from ml_collections import config_flags

from fvq_jax.runtime.config_file import explain, let_import
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.exits import BAD_INPUT, fail
from fvq_jax.runtime.names import did_you_mean, dotted
from fvq_jax.runtime.paths import with_home
from fvq_jax.runtime.processes import OPTIONS, TIMEOUT, Place

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, report")
CONFIG = config_flags.DEFINE_config_file("config", help_string="Config of the run, such as configs/fvq16k.py:smoke")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, OPTIONS["distributed"])
COORDINATOR = flags.DEFINE_string("coordinator", None, OPTIONS["coordinator"])
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, OPTIONS["num_processes"])
PROCESS_ID = flags.DEFINE_integer("process_id", None, OPTIONS["process_id"])
DISTRIBUTED_TIMEOUT = flags.DEFINE_integer("distributed_timeout", TIMEOUT, OPTIONS["distributed_timeout"])
PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "FIRST:LAST, the steps to trace into WORKDIR/profile")
# These do nothing where no single run is started.
ONE_RUN = (DISTRIBUTED, COORDINATOR, NUM_PROCESSES, PROCESS_ID, DISTRIBUTED_TIMEOUT, PROFILE_STEPS)
_OVERRIDE = re.compile(r"--?config\.([\w.]+)")


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the command line, config file and overrides; an error ends the program with one line and exit code 2.

    --help ends it with exit code 0.
    """
    argv = with_home(argv)
    given = _config_file(argv)
    try:
        if given is not None:
            require(given != "", "--config= is empty: give it a config file")
            let_import(given)
        rest = flags.FLAGS(argv)
        require(WORKDIR.value != "", "--workdir= is empty: give it a folder")
        if CONFIG.value is not None:
            CONFIG.value.keys()  # a file that could not be read raises only at this access
        elif given is not None:
            raise InputError(f"get_config() of {given} returns nothing: it must return a ConfigDict")
        return rest
    except SystemExit:  # absl ends --help with exit code 1
        if any(arg.lstrip("-").startswith(("help", "?")) for arg in argv):
            sys.exit(0)
        raise
    except Exception as error:
        sys.exit(fail(_unknown_field(argv, given or "") or _explained(error, given or ""), BAD_INPUT))


def place() -> Place | None:
    """The place among several processes that the flags give, see `Place.of`. Ends the program if they cannot be."""
    try:
        return Place.of(
            DISTRIBUTED.value, DISTRIBUTED_TIMEOUT.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
        )
    except InputError as error:
        sys.exit(fail(str(error)))


def keep_compiled(workdir: str) -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR or, without it, in the workdir: a restart begins at once."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.abspath(workdir), "compilation_cache"))


def _config_file(argv: list[str]) -> str | None:
    """The config file of the command line, without the argument that may follow it; None if there is no --config."""
    # The flags may not have been parsed to their end, so the command line itself is looked into.
    words = re.findall(r"(?:^|\0)--?config[=\0]([^\0]*)", "\0".join(argv))
    return words[-1].partition(":")[0] if words else None


def _unknown_field(argv: list[str], given: str) -> str:
    """Names the first overridden field that the config does not have, and what may be meant; empty if there is none."""
    overrides = [match[1] for text in argv if (match := _OVERRIDE.match(text))]
    if not given or not overrides:
        return ""
    plain = flags.FlagValues()  # the same file, without overrides
    config = config_flags.DEFINE_config_file("config", flag_values=plain, sys_argv=argv[:1])
    try:
        plain([argv[0], f"--config={given}"])
        known = dotted(config.value)
    except Exception:  # the file itself is wrong, which the caller will report
        return ""
    for name in overrides:
        if name not in known and not any(field.startswith(f"{name}.") for field in known):
            return f"unknown config field {name}{did_you_mean(name, known)}"
    return ""


def _explained(error: Exception, given: str) -> str:
    """What went wrong, without what absl and ml_collections put around what the config file `given` has raised."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text or text.startswith("Configuration is not available"):
        raised: BaseException = error
        while (before := raised.__cause__ or (None if raised.__suppress_context__ else raised.__context__)) is not None:
            raised = before
        return explain(raised, given) if isinstance(raised, Exception) else text
    # A value of the command line is what the first ones are about.
    return text if isinstance(error, flags.Error | TypeError | ValueError | OSError) else explain(error, given)
