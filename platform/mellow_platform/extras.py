"""Packages that only some users need: the optional dependencies of pyproject.toml, imported where they are used."""

from importlib.util import find_spec


def require(*modules: str, extra: str) -> None:
    """Make sure that modules of an extra are installed, without importing them.

    Raises:
        ImportError: one is not; the message has the command that installs it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} is not installed: pip install 'mellow-platform[{extra}]'")
