"""Command lines of the programs that read a config: absl flags, with errors in one line."""

import os
import re
import sys
import traceback

import jax
from absl import flags
from ml_collections import config_flags

from fvq_jax.runtime.errors import InputError
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
    try:
        rest = flags.FLAGS(with_home(argv))
        if CONFIG.value is not None:
            CONFIG.value.keys()  # a file that could not be read raises only at this access
        return rest
    except SystemExit:  # absl ends --help with exit code 1
        if any(arg.lstrip("-").startswith(("help", "?")) for arg in argv):
            sys.exit(0)
        raise
    except (KeyError, AttributeError, ImportError) as error:
        sys.exit(fail(_unknown_field(argv) or _in_file(error), BAD_INPUT))
    except (flags.Error, InputError, TypeError, ValueError, OSError) as error:
        sys.exit(fail(_last_line(error), BAD_INPUT))


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


def _unknown_field(argv: list[str]) -> str:
    """Names the first overridden field that the config does not have, and what may be meant; empty if there is none."""
    # The flags may not have been parsed to their end, so the file is looked up in the command line itself.
    words = re.findall(r"(?:^|\0)--?config[=\0]([^\0]*)", "\0".join(argv))
    given = words[0] if words else ""
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


def _in_file(error: Exception) -> str:
    """The message for an error in the config file, with the line that raised it."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "ml_collections" not in frame.filename]
    where = f" ({os.path.relpath(lines[-1].filename)}, line {lines[-1].lineno}: {lines[-1].line})" if lines else ""
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps one error into another
        error = error.args[0]
    text = str(error.args[0]) if error.args else type(error).__name__
    text = " ".join(re.sub(r"Other fields present:.*?(?=Did you mean|$)", "", text, flags=re.DOTALL).split())
    return f"the config file cannot be used: {text}{where}"


def _last_line(error: Exception) -> str:
    """What went wrong, without what ml_collections puts around it: a traceback, or its attempts to open a file."""
    text = re.sub("Configuration is not available.*load:", "the config file cannot be read:", str(error).strip())
    text = re.sub(r"Failed loading .*No such file or directory: '(.*)'", r"there is no file \1", text, flags=re.DOTALL)
    if "Traceback (most recent call last)" not in text:
        return text
    return re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
