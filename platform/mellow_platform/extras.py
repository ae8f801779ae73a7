"""Optional dependencies of pyproject.toml ("extras"), imported only by the functions that use them."""

from importlib.util import find_spec


def require(*modules: str, extra: str) -> None:
    """Check that modules of an extra are installed, without importing them.

    Raises:
        ImportError: a module is not installed; the message contains the command that installs the extra.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} is not installed: pip install 'mellow-platform[{extra}]'")
