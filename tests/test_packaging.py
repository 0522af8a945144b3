"""The wheel holds everything that an installation away from the checkout needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from lisa_dist.config.loading import conf_dir

CHECKOUT = Path(__file__).parents[1]


def set_of_modules(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in (folder / "lisa_dist").rglob("*.py")}


def test_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=CHECKOUT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    modules, packed = (set_of_modules(folder) for folder in (CHECKOUT, installed))
    assert packed == modules
    groups = {str(file.relative_to(conf_dir())) for file in conf_dir().rglob("*.yaml")}
    assert {str(file.relative_to(installed / "lisa_dist/conf")) for file in installed.rglob("conf/**/*.yaml")} == groups
    assert (installed / "lisa_dist" / "py.typed").is_file(), "else the types are not seen by who imports the package"
    (license_file,) = installed.glob("*.dist-info/licenses/LICENSE")
    assert license_file.read_bytes() == (CHECKOUT / "LICENSE").read_bytes()
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert "License-Expression: Apache-2.0\n" in metadata.read_text()

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, check=True, capture_output=True, text=True
        ).stdout

    where = "from lisa_dist.config.loading import conf_dir; print(conf_dir())"
    assert run("-c", where).strip() == str(installed / "lisa_dist" / "conf")
    assert "method: lisa\n" in run("-m", "lisa_dist", "train", "--cfg", "job")
    assert not any(elsewhere.iterdir())


def test_the_image_gets_what_an_installation_needs() -> None:
    lines = (CHECKOUT / "launch" / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {project["project"]["readme"], *project["project"]["license-files"], *wheel["packages"]}
    assert copied == {*needed, *wheel["force-include"], "pyproject.toml", "constraints.txt"}
    let_in = {line[1:] for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == copied and all((CHECKOUT / name).exists() for name in copied)
