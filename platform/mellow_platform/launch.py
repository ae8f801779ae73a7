"""What a Ray cluster on this machine is started with: a token, a temporary folder, and a path of Python without spaces.

Ray starts its workers through a shell and does not quote the interpreter's path, so an environment whose path has a
space is used through a link.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from mellow_platform.authentication import authentication

LONGEST_PARENT = 30  # characters: a socket's path may have 107, and Ray puts 60 to 70 of its own after the folder


def temporary_folder(prefix: str = "ray-") -> Path:
    """Create a temporary folder whose path is short and has no space, as Ray needs it; return its path."""
    parent = tempfile.gettempdir()
    usable = len(parent) < LONGEST_PARENT and " " not in parent
    return Path(tempfile.mkdtemp(prefix=prefix, dir=None if usable else "/tmp"))


def programs(folder: Path) -> Path:
    """Return the folder with this environment's `python` and `ray`, by a path without spaces.

    Start `ray` as `python ray`: its first line names the interpreter by the path with the space.

    Args:
        folder: where a link to the environment is created if its path has a space; must outlive the cluster.
    """
    here = Path(sys.executable).parent
    if " " not in str(here):
        return here
    link = folder / "environment"
    if not link.is_symlink():
        link.symlink_to(here.parent)
    return link / here.name


def prepare_process() -> None:
    """Prepare this process to start clusters with `ray.init`: set the token's variables and `sys.executable`.

    What is created for them is deleted when the process ends. Call it before `import ray`, which reads the variables
    once.
    """
    folder = temporary_folder("mellow-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(authentication(folder))
    sys.executable = str(programs(folder) / Path(sys.executable).name)
