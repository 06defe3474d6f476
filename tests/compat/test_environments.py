"""The environments of `make compat` stand at the ends of the ranges of pyproject.toml, and say why they cannot be made."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.compat import environments
from tests.compat.environments import ENVIRONMENTS, NEWEST, ROOT, CannotBuildError, Environment

RANGED = ("torch", "triton", "transformers")
BY_NAME = {environment.name: environment for environment in ENVIRONMENTS}


def ranges() -> dict[str, tuple[str, str]]:
    """{distribution: (first version, first version that is too new)}."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for line in project["dependencies"]:
        if match := re.match(r"([\w-]+)>=([\d.]+),<([\d.]+)", line):
            found[match[1]] = (match[2], match[3])
    return found


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


@pytest.mark.parametrize("name", RANGED)
def test_both_ends_are_tested(name: str) -> None:
    """The oldest environment has the first minor version, constraints.txt the last."""
    first, beyond = map(numbers, ranges()[name])
    assert numbers(BY_NAME["oldest"].pins[name]) == first
    tested = re.search(rf"^{name}==([\d.]+)$", environments.constraints({}), flags=re.MULTILINE)
    assert tested is not None
    major, minor = numbers(tested[1])
    assert [major, minor + 1] == beyond


def test_each_python_is_tested() -> None:
    classifiers = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = set(re.findall(r"Python :: (3\.\d+)", classifiers))
    assert {environment.python for environment in ENVIRONMENTS} - {None} == pythons - {"3.11"}


def test_pins_take_the_place_of_constraints() -> None:
    plain, pinned = (environments.constraints(pins).splitlines() for pins in ({}, {"transformers": "5.17.0"}))
    assert "transformers==5.17.0" in pinned
    gone = {line.partition("==")[0] for line in set(plain) - set(pinned)}
    assert gone == {"transformers", *environments.FOLLOWS_TRANSFORMERS}
    newest = environments.constraints({"transformers": NEWEST}).splitlines()
    assert not [line for line in newest if line.startswith("transformers")]
    assert environments.requirement("peft", NEWEST) == "peft"


def test_what_is_tested_exists() -> None:
    for environment in ENVIRONMENTS:
        assert all((ROOT / path).exists() for path in environment.tests), environment.name


def test_a_conflict_is_named() -> None:
    said = (
        "INFO: pip is looking\nERROR: Cannot install a and b because these have conflicting dependencies.\n\n"
        "The conflict is caused by:\n    torch 2.11.0 depends on setuptools<82\n"
        "    The user requested (constraint) setuptools==84.2.1\n\nTo fix this you could try to:\nERROR: ResolutionImpossible"
    )
    expected = "torch 2.11.0 depends on setuptools<82; The user requested (constraint) setuptools==84.2.1"
    assert environments.reason(said) == expected
    assert environments.reason("one\nERROR: no matching distribution\nmore") == "ERROR: no matching distribution"
    assert environments.reason("") == "no message"


def test_a_python_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    with pytest.raises(CannotBuildError, match=r"there is no python3\.99 here"):
        environments.build(Environment("future", {}, python="3.99"))
    assert not list(tmp_path.iterdir())


def test_the_status_tells_what_happened(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    built: list[str] = []

    def build(environment: Environment) -> Path:
        built.append(environment.name)
        if environment.name == "python-3.12":
            raise CannotBuildError("there is no python3.12 here")
        return Path("python")

    outcome = {"oldest": "pytest ended with status 1", NEWEST: "signatures changed"}
    monkeypatch.setattr(environments, "build", build)
    monkeypatch.setattr(environments, "test", lambda environment, *_: outcome.get(environment.name, ""))

    def status(*names: str) -> int:
        monkeypatch.setattr("sys.argv", ["environments", *names])
        return environments.main()

    assert status() == 1
    assert built == [environment.name for environment in ENVIRONMENTS if environment.name != NEWEST]
    assert status("triton-3.6") == 0
    assert status("triton-3.6", "python-3.12") == 2
    assert status(NEWEST) == 1
    assert "newest: signatures changed" in capsys.readouterr().out
