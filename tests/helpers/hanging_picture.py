"""A picture that cannot be opened to its end, as on a network mount that no longer answers."""

# a named pipe will not do: a folder of pictures leaves pipes out
PROGRAM = """
import runpy, sys, threading

from fvq_jax.data.folder import FolderSource

_, name, module, *options = sys.argv
read = FolderSource.__getitem__

def read_or_hang(source, index):
    if source.relative_name(index) == name:
        threading.Event().wait()
    return read(source, index)

FolderSource.__getitem__ = read_or_hang
sys.argv = [module, *options]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def with_hanging_picture(name: str, module: str) -> list[str]:
    """Arguments of Python, before the module's own, to run it where the picture of this name below its folder hangs."""
    return ["-c", PROGRAM, name, module]
