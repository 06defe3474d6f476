"""The API reference is what the docstrings say now, and everything public has one."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = ROOT / "docs" / "generate_api.py"
    spec = importlib.util.spec_from_file_location("generate_api", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up while it is made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "generate_api", module)
        spec.loader.exec_module(module)
    return module


def test_is_up_to_date(generator: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == generator.text(), "a docstring changed: run make docs"


def test_everything_public_has_a_docstring(generator: ModuleType) -> None:
    assert not generator.undocumented()


def test_every_op_is_in_it(generator: ModuleType) -> None:
    import mllm_fast
    from mllm_fast import ops
    from mllm_fast.kernels import runtime

    page = generator.text()
    declared = [op.name for op in runtime.ops() if hasattr(ops, op.name)]
    assert declared
    missing = [
        name for name in (*declared, *mllm_fast.__all__) if f"### {name}\n" not in page and name != "__version__"
    ]
    assert not missing
