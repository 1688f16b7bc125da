"""The wheel holds the whole package, and works where nothing but the wheel is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import grasp_lora

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "grasp_lora"

pytestmark = pytest.mark.slow
pytest.importorskip("hatchling", reason="hatchling is not installed (pip install hatchling)")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"grasp_lora-{grasp_lora.__version__}-py3-none-any.whl"
    target = folder / "site"
    install = ["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=120)
    return target


@pytest.fixture
def ran(installed, tmp_path):
    """Return a function that gives what Python prints in an empty folder with that package."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_every_file_of_the_package_and_no_other(installed):
    def files(folder: Path) -> set[str]:
        found = (one for one in folder.rglob("*") if one.is_file())
        return {
            one.relative_to(folder).as_posix() for one in found if "__pycache__" not in one.parts
        }

    held = files(installed / "grasp_lora")
    assert held == files(PACKAGE)
    assert {"py.typed", "config/demo.yaml", "data/facts/animal.json", "report/card.md"} <= held
    assert "report/templates/report.html" in held
    beside = {one.name for one in installed.iterdir()}
    assert beside == {"bin", "grasp_lora", f"grasp_lora-{grasp_lora.__version__}.dist-info"}


def test_the_installed_package_is_the_one_that_runs(installed, ran):
    where = ran("-c", "import grasp_lora; print(grasp_lora.__file__)").strip()
    assert Path(where) == installed / "grasp_lora" / "__init__.py"


def test_the_installed_command_runs(installed, ran, tmp_path):
    assert "Commands:" in ran("-m", "grasp_lora", "--help")
    assert "Commands:" in ran(str(installed / "bin" / "grasp-lora"), "--help")
    row = {"id": "1", "prediction": "Kigali", "references": ["Kigali"]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row), encoding="utf-8")
    score = ("score", "answers.jsonl", "--language", "es", "--metrics", "exact_match")
    ran("-m", "grasp_lora", *score, "--json", "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text("utf-8"))
    assert scores["exact_match"]["value"] == 100


def test_the_installed_package_reads_its_own_files(ran):
    read = (
        "from importlib import resources\n"
        "from grasp_lora.config.run_config import load_config, paper_settings\n"
        "from grasp_lora.data.builtin import builtin_examples\n"
        "demo = resources.files('grasp_lora') / 'config' / 'demo.yaml'\n"
        "print(paper_settings()['recipe'], load_config(str(demo)).model.name)\n"
        "print(len(builtin_examples('es', 5)))\n"
    )
    assert ran("-c", read).split() == ["grasp", "smollm2", "5"]
