"""The images have all that runs, and the chart asks for them."""

import re

import yaml

from deploy.kubernetes.chart import CHART
from tests.unit.deploy.kubernetes.rendering import REPOSITORY

PROJECT = (REPOSITORY / "pyproject.toml").read_text()


def test_every_package_is_among_what_the_images_are_built_from():
    (included,) = re.findall(r"^include = \[(.*)\]$", PROJECT, re.MULTILINE)
    packages = {name.rstrip("*") for name in re.findall(r'"([^"]+)"', included)}
    allowed = {line.removeprefix("!") for line in (REPOSITORY / ".dockerignore").read_text().splitlines()}
    assert packages <= allowed


def test_the_chart_and_its_image_are_of_this_version():
    (version,) = re.findall(r'^version = "(.*)"$', PROJECT, re.MULTILINE)
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (about["version"], about["appVersion"]) == (version, version)
