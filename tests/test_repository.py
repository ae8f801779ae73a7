"""Repository as a whole: `platform/` does not shadow Python's module, and scripts start from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mellow_platform.extras import require
from tests.conftest import REPOSITORY


def test_repository_does_not_shadow_platform():
    code = "import platform, json; print(platform.python_version())"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ".".join(map(str, sys.version_info[:3]))


def test_lower_layers_do_not_import_higher_ones():
    code = (
        "import sys, mellow_platform.data.builtin_corpora, mellow_platform.data.audio;"
        "print([n for n in sys.modules if n.startswith('mellow_platform.') and n.split('.')[1] not in"
        " ('data', 'storage', 'settings', 'option_values')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


SCRIPTS = sorted(
    path for folder in ("benchmarks", "chaos", "fuzz") for path in (REPOSITORY / "tests" / folder).glob("*.py")
)


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if "__main__" in path.read_text()], ids=lambda path: path.stem
)
@pytest.mark.extended
def test_script_starts_without_python_path(script: Path, tmp_path: Path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script), "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


# Packages of extras, which `pip install mellow-platform` does not install.
EXTRAS = ["deepspeed", "tensorboard", "pycocoevalcap", "datasketch", "py3langid", "gguf", "mlflow"]
WITHOUT_EXTRAS = f"""
import importlib.abc, importlib.util, sys
find_spec = importlib.util.find_spec
def is_absent(name):
    return name.partition(".")[0] in {EXTRAS}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if is_absent(name):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
importlib.util.find_spec = lambda name, package=None: None if is_absent(name) else find_spec(name, package)
import serve.ingress, serve.model
import mellow_platform.inference.engine, mellow_platform.inference.predict_job
import mellow_platform.preprocessing.preprocess_job
import mellow_platform.evaluation.evaluate_job, mellow_platform.training.finetune, mellow_platform.training.tagger
import mellow_platform.synthesis.synthesize_job, mellow_platform.training.ablation
"""


def test_modules_import_without_extras():
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_missing_extra_is_named_with_install_command():
    require("numpy", extra="metrics")
    with pytest.raises(ImportError, match=r"no_such_package is not installed: .*\[metrics\]"):
        require("numpy", "no_such_package", extra="metrics")
