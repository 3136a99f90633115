from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path

import pytest

import portshm
from portshm import errors

from .children import run_python

PACKAGE = Path(portshm.__file__).parent

WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("filelock", "numpy"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
"""


def test_all_is_sorted_and_complete() -> None:
    assert portshm.__all__ == sorted(portshm.__all__)
    assert len(set(portshm.__all__)) == len(portshm.__all__)
    public = {
        name
        for name, thing in vars(portshm).items()
        if not name.startswith("_") and not isinstance(thing, types.ModuleType) and name != "annotations"
    }
    assert public == set(portshm.__all__)
    assert set(errors.__all__) <= public


def test_the_package_itself_holds_no_logic() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If))]


def test_everything_public_is_documented() -> None:
    for name in portshm.__all__:
        thing = getattr(portshm, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), name


def test_works_where_only_the_standard_library_is() -> None:
    done = run_python(WITHOUT + "from portshm import *; SharedMem.create(10).set_value(b'x')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_brings_neither_filelock_nor_numpy() -> None:
    done = run_python(
        "import sys, portshm; print(sorted({'filelock', 'numpy'} & {m.partition('.')[0] for m in sys.modules}))"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_locked_without_filelock_names_the_extra() -> None:
    done = run_python(WITHOUT + "import portshm.locked")
    assert done.returncode == 1
    assert "pip install 'portshm[sync]'" in done.stderr.splitlines()[-1]


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", ["locked", "errors"])
def test_the_public_modules_list_what_is_public(name: str) -> None:
    if name == "locked":
        pytest.importorskip("filelock")
    module = __import__(f"portshm.{name}", fromlist=["*"])
    assert all(hasattr(module, public) for public in module.__all__)
