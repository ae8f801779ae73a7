"""Token of a Ray cluster on this machine, started by the demo, `mellow cluster up`, a job or a test.

Ray's default is a token in `~/.ray`, which fails if the home folder is read-only, and which is never deleted.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

TOKEN = "auth_token"
NAMES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # Ray's variables, in the order in which Ray looks at them


def authentication(folder: Path) -> dict[str, str]:
    """Return the environment variables that give a cluster and its clients their token.

    A token in the environment is kept. Otherwise the token is the file `auth_token` in `folder`, readable by its owner
    only, and written if it is missing. The home folder is neither read nor written.

    Raises:
        FileNotFoundError: RAY_AUTH_TOKEN_PATH names a file that does not exist.
    """
    variables = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    if not variables:
        file = folder.absolute() / TOKEN
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32))
        variables = {"RAY_AUTH_TOKEN_PATH": str(file)}
    read_token(variables)
    return {"RAY_AUTH_MODE": "token"} | variables


def is_ray_running() -> bool:
    """Return whether `ray start` started a cluster on this machine; `ray.init` then connects to it with its token."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").exists()


def read_token(environment: Mapping[str, str] = os.environ) -> str:
    """Return Ray's token in an environment, for the header `Authorization: Bearer`.

    Raises:
        FileNotFoundError: the token is missing.
    """
    if token := environment.get("RAY_AUTH_TOKEN"):
        return token
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not file.exists():
        raise FileNotFoundError(
            f"Ray's token file {file} does not exist: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        )
    return file.read_text().strip()
