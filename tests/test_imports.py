"""Imports run one way, and each platform difference is in one file. Read from the source, so that nothing escapes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import portshm

PACKAGE = Path(portshm.__file__).parent

# A module may import from its own level's group and from lower levels: errors <- header, region <- backends <-
# shared_mem <- (locked), (pool) <- cli. By first part of the module's path; longest match first.
LEVELS = {
    "errors": 0,
    "_region": 1,
    "_header": 1,
    "_buffers": 1,
    "_backends": 2,
    "_shared_mem": 3,
    "_reaper": 3,
    "_large_bytes": 3,
    "_payload": 3,
    "locked": 4,
    "pool": 4,
    "_map_job": 5,
    "_bench": 5,
    "_cli": 5,
    "__init__": 6,
    "__main__": 6,
}

# The floors of the pool, from the ground up: the child's side and the parent's know nothing of each other but `serve`,
# which the parent starts, and the engine nothing of the two pools that are made of it.
POOL_LEVELS = {
    "pool/_interrupts": 0,
    "pool/_wire": 1,
    "pool/_work": 2,
    "pool/_child": 3,
    "pool/_engine": 4,
    "pool/_options": 5,
    "pool/_results": 5,
    "pool/_feeding": 6,
    "pool/_pool": 7,
    "pool/_executor": 8,
    "pool": 9,
}

# What goes beyond the levels. Left of the colon may not import right of it, whatever the levels say.
APART = {
    "_header": {"_region", "_buffers", "_backends"},
    "_region": {"_header", "_buffers"},
    "_buffers": {"_header", "_region"},
    "_backends": {"_header", "_buffers"},
    "_shared_mem": {"_reaper"},
    "_reaper": {"_shared_mem", "_header"},
    "locked": {"pool"},
    "pool": {"locked"},
    # The scheduler is pure state, and the child's side never looks at the parent's.
    # The child's side never looks at the parent's, and the scheduler is pure state.
    "pool/_child/server": {"pool/_work", "pool/_engine"},
    "pool/_engine/scheduler": {"pool/_engine/worker", "pool/_engine/coordinator", "_shared_mem", "_backends"},
}

IMPURE = {"multiprocessing", "os", "subprocess", "threading", "time", "selectors", "signal", "mmap"}

# Besides _backends/; each owns one difference, named here.
PLATFORM_FILES = {
    "pool/_wire/pipe.py": "Windows reads and writes its pipes by whole messages",
    "pool/_interrupts.py": "Windows has no signal masks, and only Linux kills by a pipe's end",
    "pool/_engine/exit_status.py": "only Linux tells of kills for want of memory",
    "pool/_engine/channel.py": "pipes of Windows cannot be set not to wait",
    "pool/_engine/waiter.py": "Windows waits for handles, POSIX for descriptors",
}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__")


def group_of(module: str) -> str:
    first = module.partition("/")[0]
    return "_bench" if first.startswith("_bench") else first


def pool_group_of(module: str) -> str:
    return "/".join(module.split("/")[:2])


def imports_of(file: str) -> Iterator[tuple[str, int]]:
    """Every import in the file, late ones inside functions too: its path inside the package, or `outside:NAME`."""
    folder = ["portshm", *Path(file).parent.parts]
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _inside(alias.name.split(".")), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                deeper = [*parts, alias.name]
                is_module = (PACKAGE.parent / "/".join(deeper)).with_suffix(".py").exists()
                yield _inside(deeper if is_module else parts), node.lineno


def _inside(parts: list[str]) -> str:
    return ("/".join(parts[1:]) or "__init__") if parts[0] == "portshm" else "outside:" + parts[0]


def test_every_module_has_a_level() -> None:
    assert {group_of(module_of(file)) for file in FILES} <= set(LEVELS)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file: str) -> None:
    here = module_of(file)
    for target, line in imports_of(file):
        if target.startswith("outside:"):
            continue
        mine, theirs = group_of(here), group_of(target)
        assert mine == theirs or LEVELS[theirs] <= LEVELS[mine], f"{file}:{line} imports {target}, which is above it"
        forbidden = APART.get(here, set()) | APART.get(mine, set())
        assert not {target, theirs} & forbidden, f"{file}:{line} imports {target}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("pool/")])
def test_imports_go_down_inside_the_pool(file: str) -> None:
    mine = pool_group_of(module_of(file))
    for target, line in imports_of(file):
        theirs = pool_group_of(target)
        if theirs.startswith("pool"):
            inside = mine == theirs or POOL_LEVELS[theirs] < POOL_LEVELS[mine]
            assert inside, f"{file}:{line} imports {target}, which is above it"


@pytest.mark.parametrize("file", FILES)
def test_nothing_imports_locked_or_the_command_line(file: str) -> None:
    targets = {target for target, _ in imports_of(file)}
    assert "locked" not in targets
    assert "_cli" not in targets or file == "__main__.py"


@pytest.mark.parametrize("file", FILES)
def test_only_locked_imports_filelock_and_nobody_numpy(file: str) -> None:
    outside = {target.removeprefix("outside:") for target, _ in imports_of(file)}
    assert "filelock" not in outside or file == "locked.py"
    assert "numpy" not in outside or file.startswith("_bench")


@pytest.mark.parametrize("module", ["scheduler", "backlog", "deadlines", "deaths", "life", "starts"])
def test_what_is_pure_knows_no_process_pipe_or_clock(module: str) -> None:
    targets = imports_of(f"pool/_engine/{module}.py")
    assert not {target.removeprefix("outside:") for target, _ in targets} & IMPURE


@pytest.mark.parametrize("file", FILES)
def test_the_platform_is_asked_for_in_few_places(file: str) -> None:
    if file.startswith("_backends/") or file in PLATFORM_FILES:
        return
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("sys", "platform"), ("os", "name")}, f"{file}:{node.lineno}"


def functions_of(file: str) -> dict[str, str]:
    """Public functions, and public methods of classes, with their parameters as written."""
    found = {}
    for node in ast.parse((PACKAGE / file).read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef) and (not member.name.startswith("_") or member.name == "__init__"):
                found[owner + member.name] = (
                    f"({ast.unparse(member.args)}) -> {ast.unparse(member.returns or ast.Constant(None))}"
                )
    return found


def test_the_operating_systems_supply_the_same_functions() -> None:
    # The Windows one cannot be imported here, and mypy checks each only against its own callers.
    posix, windows = functions_of("_backends/_posix.py"), functions_of("_backends/_windows.py")
    assert posix == windows
    supplied = ast.parse((PACKAGE / "_backends/_system.py").read_text())
    taken = [
        {a.name for a in node.names} for node in ast.walk(supplied) if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert len(taken) == 2
    assert taken[0] == taken[1]
    assert {name for name in taken[0] if name != "OwnedFile"} <= set(posix)
