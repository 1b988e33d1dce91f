"""The extras of setup.cfg, for systems that these tests do not run on: one TensorFlow each, which has wheels there."""

from configparser import ConfigParser

import pytest
from packaging.requirements import Requirement

SYSTEMS = {
    ("linux", "x86_64"): "tensorflow-cpu",
    ("linux", "aarch64"): "tensorflow",
    ("darwin", "arm64"): "tensorflow",
    ("win32", "AMD64"): "tensorflow-cpu",
}
"""The package that `tf-cpu` brings to each. `tensorflow` has wheels for all of them."""


@pytest.fixture(scope="module")
def extras(request) -> dict[str, list[Requirement]]:
    """What each extra names, as setuptools reads it."""
    parser = ConfigParser(delimiters=["="])
    parser.read(request.config.rootpath / "setup.cfg")
    lines = {name: text.splitlines() for name, text in parser["options.extras_require"].items()}
    return {name: [Requirement(line) for line in lines if line] for name, lines in lines.items()}


def brought(requirements, system) -> set[str]:
    """The packages that an extra brings to a system."""
    environment = dict(zip(("sys_platform", "platform_machine"), system, strict=True))
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)}


@pytest.mark.parametrize("system", SYSTEMS, ids="-".join)
def test_every_extra_brings_one_tensorflow_or_none(extras, system):
    ours = {"tf": "tensorflow", "all": "tensorflow", "tf-cpu": SYSTEMS[system], "dev": SYSTEMS[system]}
    assert ours.keys() < extras.keys()
    for name, requirements in extras.items():
        packages = brought(requirements, system)
        expected = {ours[name]} if name in ours else set()
        assert {package for package in packages if package.startswith("tensorflow")} == expected, name
        assert ("keras" in packages) == (name in ours), name


def test_both_tensorflows_want_the_same_versions(extras):
    ranges = {str(r.specifier) for r in extras["tf"] + extras["tf-cpu"] if r.name.startswith("tensorflow")}
    assert len(ranges) == 1
