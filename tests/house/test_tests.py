"""Rules of the tests themselves: where a test lies says what it is of, and tests share support, not each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS, LIBRARY = ROOT / "tests", ROOT / "ringattn"
# what is no room of the library: its public functions and classes, the main job, the repository, and what tests share
OTHERS = {"doors", "launch", "house", "support"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports from, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {"." * node.level + (node.module or ""), *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_no_test_imports_from_another() -> None:
    for path in TESTS.rglob("*.py"):
        others = {name for name in imported(path) if name.split(".")[-1].startswith("test_") or ".test_" in name}
        assert not others, f"{path.relative_to(ROOT)} imports from {others}: what tests share lies in tests/support"


def test_every_folder_is_that_of_a_room() -> None:
    rooms = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= rooms | OTHERS, f"{folders - rooms - OTHERS} are no rooms of ringattn/"
    assert rooms - folders <= {"cli"}, f"{rooms - folders} have no tests"  # the command is tested with check
    assert all((TESTS / folder / "__init__.py").exists() for folder in folders)
    assert not list(TESTS.glob("test_*.py")), "a test lies in the folder of what it tests"
    assert not list((TESTS / "support").glob("test_*.py"))
