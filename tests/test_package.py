"""Law: what the wheel installs is what the repository holds, and importing grzoo stays cheap."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import grzoo

ROOT = Path(__file__).parents[1]
FOLDERS = ("grzoo", "models", "embeddings", "data", "recipes", "ds_configs")


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sub_packages_on_disk():
    folders = (path.parent.relative_to(ROOT) for top in FOLDERS for path in (ROOT / top).rglob("__init__.py"))
    return {".".join(f.parts) if f.parts[0] == "grzoo" else ".".join(("grzoo", *f.parts)) for f in folders}


def test_packages_are_those_on_disk():
    assert sub_packages_on_disk() == set(project()["tool"]["setuptools"]["packages"])


def test_every_folder_with_modules_is_a_package():
    for top in FOLDERS:
        for module in (ROOT / top).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} has modules but no __init__.py"


def test_importing_grzoo_imports_nothing_heavy():
    code = "import sys, grzoo; print(sorted({'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_models_and_data_do_not_import_deepspeed():
    code = "import sys, grzoo.models, grzoo.data, grzoo.embeddings; print('deepspeed' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_public_names_resolve():
    for name in grzoo.__all__:
        assert getattr(grzoo, name) is not None
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = grzoo.NoSuchName


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_of_the_sdist_works_outside_the_repository(tmp_path, readme_block):
    """Builds sdist -> wheel, installs it beside the packages of this environment, trains and reloads."""
    dist = tmp_path / "dist"
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)], check=True)
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "grzoo/py.typed" in names
    assert "grzoo/ds_configs/zero1.json" in names
    assert "grzoo/recipes/configs/hstu_ml1m.yaml" in names
    assert "grzoo/models/demo/export/config.json" in names
    assert not [name for name in names if name.startswith("tests/")]
    python = _clean_environment(tmp_path / "venv", wheel)
    where = subprocess.run(
        [python, "-c", "import grzoo; print(grzoo.__file__)"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(tmp_path) in where.stdout
    train = "--config hstu_synthetic --max_steps 4 --eval_strategy no --use_cpu --output_dir out".split()
    launcher = [python, "-m", "deepspeed.launcher.runner", "-q", "--master_port", "29571", "--num_accelerators", "2"]
    subprocess.run([*launcher, "--module", "grzoo.recipes.train", *train], cwd=tmp_path, check=True)
    load = "from grzoo import AutoModelForRetrieval; AutoModelForRetrieval.from_pretrained('out/export')"
    subprocess.run([python, "-c", load], cwd=tmp_path, check=True)
    code, output = readme_block
    shown = subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert shown.stdout == output


def _clean_environment(folder: Path, wheel: Path) -> str:
    """An environment that holds the wheel and borrows the other packages of this one, but not its grzoo."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = Path(torch.__file__).parents[1]
    for path in borrowed.iterdir():
        if "grzoo" in path.name or path.name.startswith(("pip", "_", "setuptools")):
            continue
        target = site / path.name
        if not target.exists():
            target.symlink_to(path)
    return str(python)
