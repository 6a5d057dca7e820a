"""constraints.txt, Dockerfile and environment.yml say what pyproject.toml says."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def pins():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return [(canonicalize_name(name), version) for name, version in (line.split("==") for line in lines if line)]


def test_no_package_is_pinned_twice():
    names = [name for name, _ in pins()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *(text for texts in EXTRAS.values() for text in texts)])
def test_every_requirement_has_a_pin_within_its_bounds(text):
    requirement = Requirement(text)
    name = canonicalize_name(requirement.name)
    if name == PROJECT["name"]:
        assert requirement.extras <= set(EXTRAS)
    else:
        assert requirement.specifier.contains(dict(pins())[name])


def test_the_image_has_the_tested_versions_and_known_extras():
    assert f"torch=={dict(pins())['torch']}" in DOCKERFILE
    (python,) = re.findall(r"^FROM python:([\d.]+)-", DOCKERFILE, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    (extras,) = re.findall(r'-c constraints\.txt "\.\[([\w,]+)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= set(EXTRAS)
    copied = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "lte_lightning", "conf", "sweeps"} <= set(
        copied
    )


def test_the_conda_environment_has_the_image_s_python_and_extras():
    (python,) = re.findall(r"^FROM python:([\d.]+)-", DOCKERFILE, re.MULTILINE)
    assert f"python={python}" in ENVIRONMENT
    (by_pip,) = [entry["pip"] for entry in ENVIRONMENT if isinstance(entry, dict)]
    assert "-c constraints.txt" in by_pip
    (extras,) = re.findall(r"-e \.\[([\w,]+)\]", "\n".join(by_pip))
    assert f'".[{extras}]"' in DOCKERFILE
