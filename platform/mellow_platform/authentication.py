"""The token of a Ray cluster that this machine starts for itself: the demo's, `mellow cluster up`'s, a job's, a test's.

Ray's own default is a token in `~/.ray`, which a read-only home folder cannot hold and which would stay there.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

TOKEN = "auth_token"
NAMES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # Ray's variables, in the order in which Ray looks at them


def authentication(folder: Path) -> dict[str, str]:
    """Return the variables with which a cluster, and whoever talks to it, has a token.

    A token that the environment names is kept. Without one, the token is the file `auth_token` in `folder`, which is
    written if it is missing, readable by its owner only. The home folder is neither read nor written.

    Raises:
        FileNotFoundError: RAY_AUTH_TOKEN_PATH names a file that does not exist.
    """
    named = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    if not named:
        file = folder.absolute() / TOKEN
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32))
        named = {"RAY_AUTH_TOKEN_PATH": str(file)}
    read_token(named)
    return {"RAY_AUTH_MODE": "token"} | named


def is_ray_running() -> bool:
    """Tell whether `ray start` has started a cluster here, which `ray.init` then connects to with its token."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").exists()


def read_token(environment: Mapping[str, str] = os.environ) -> str:
    """Return the token that Ray uses in an environment, for the header `Authorization: Bearer`.

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
