"""The repository as a whole: its `platform/` folder never shadows Python's own `platform`."""

import subprocess
import sys

from tests.conftest import REPOSITORY


def test_python_started_in_the_repository_root_imports_the_standard_platform():
    code = "import platform, json; print(platform.python_version())"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ".".join(map(str, sys.version_info[:3]))


def test_importing_lower_layers_does_not_import_higher_ones():
    code = (
        "import sys, mellow_platform.data.corpus, mellow_platform.data.audio;"
        "print([n for n in sys.modules if n.startswith('mellow_platform.') and n.split('.')[1] not in"
        " ('data', 'storage', 'config')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
