"""Preparation for a Ray cluster on this machine: token, temporary folder, and a path to Python without spaces.

Ray starts its workers through a shell and does not quote the interpreter's path. An environment whose path contains a
space is therefore used through a symbolic link.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from mellow_platform.authentication import authentication

LONGEST_PARENT = 30  # characters: a socket's path may have 107, of which Ray appends 60 to 70 to the folder


def temporary_folder(prefix: str = "ray-") -> Path:
    """Create a temporary folder whose path is short and contains no space, as Ray requires; return the path."""
    parent = tempfile.gettempdir()
    usable = len(parent) < LONGEST_PARENT and " " not in parent
    return Path(tempfile.mkdtemp(prefix=prefix, dir=None if usable else "/tmp"))


def programs(folder: Path) -> Path:
    """Return the folder of this environment's `python` and `ray`, as a path without spaces.

    Start `ray` as `python ray`: the first line of the script names the interpreter by the path with the space.

    Args:
        folder: folder for a link to the environment, created if its path contains a space; must outlive the cluster.
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

    Call it before `import ray`, which reads the variables once. The temporary folder is deleted when the process ends.
    """
    folder = temporary_folder("mellow-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(authentication(folder))
    sys.executable = str(programs(folder) / Path(sys.executable).name)
