"""Run the tests that a change affects, the nearest first, in less than a minute.

    python .ci/quick_tests.py [--base REVISION] [--seconds S] [--list] [pytest arguments]

    changed files → test files that depend on them, nearest first → pytest, until the time is over

Changed are the files that differ from the merge base with main, committed or not. A test file depends on a Python file
if it imports it, directly or through other files; its distance is the number of imports between the two, 0 if it is
named after the module, and 1 if it tests the same package. It depends on any other file if it contains its name. The
tests of the structure of the code and of the wording always run, those marked slow never. `make test` runs the tests
of all files, `make test-all` the slow ones, too; here, the summary says which tests were skipped because the time was
over.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("tests/test_structure.py", "tests/test_import_directions.py", "tests/docs/test_wording.py")
MAX_FILES = 40
SECONDS = 30.0
"""Of the minute that `make quick` has, on two idle cores; the rest is for imports and for the last test."""
MAINS = ("origin/main", "main")


def git(*words: str) -> list[str]:
    """Return the lines that a git command prints.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def merge_base() -> str:
    """Return the commit at which this branch left main; HEAD where there is no main."""
    for main in MAINS:
        if (
            subprocess.run(["git", "rev-parse", "--verify", "--quiet", main], cwd=ROOT, capture_output=True).returncode
            == 0
        ):
            return git("merge-base", "HEAD", main)[0]
    return "HEAD"


def changed_files(base: str) -> list[str]:
    """Return the files that differ from a commit, the new ones included, as paths relative to the root."""
    return sorted({*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")})


class Dependencies:
    """What every Python file of the project imports, wherever in it the import stands.

    Args:
        root: Root of the project, with the folders ``src`` and ``tests``.
    """

    def __init__(self, root: Path) -> None:
        self._modules = {name: path for path in python_files(root) for name in [module_name(path)]}
        self._importers: dict[str, set[str]] = {path: set() for path in self._modules.values()}
        self._texts = {path: (root / path).read_text(encoding="utf-8") for path in self._modules.values()}
        for path, text in self._texts.items():
            for imported in self._imports(ast.parse(text)):
                if imported != path:
                    self._importers[imported].add(path)

    def tests_of(self, changed: Iterable[str]) -> list[str]:
        """Return the test files that depend on the changed files, the nearest first."""
        distances: dict[str, int] = {}
        for path in changed:
            found = self._distances(path) if path in self._importers else self._mentions(path)
            for test, distance in found.items():
                distances[test] = min(distance, distances.get(test, distance))
        tests = [path for path in distances if Path(path).name.startswith("test_")]
        return sorted(tests, key=lambda path: (distances[path], path))

    def _distances(self, path: str) -> dict[str, int]:
        distances, waiting = {path: 0}, [path]
        for one in waiting:
            for importer in sorted(self._importers[one]):
                if importer not in distances:
                    distances[importer] = distances[one] + 1
                    waiting.append(importer)
        folder = Path(path).parent.as_posix().replace("src/bigbatch", "tests")
        own = re.compile(rf"{folder}/test_(?P<name>{Path(path).stem}(_.*)?\.py)?")
        for test in self._texts:
            if path.startswith("src/") and (found := own.match(test)):
                distances[test] = 0 if found["name"] else 1
        return distances

    def _mentions(self, path: str) -> dict[str, int]:
        return {test: 1 for test, text in self._texts.items() if Path(path).name in text}

    def _imports(self, tree: ast.AST) -> Iterator[str]:
        """Yield the files that a module imports; a string with the name of a module counts, as of lazy imports."""
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]
            yield from (self._modules[name] for name in names if name in self._modules)


def python_files(root: Path) -> list[str]:
    """Return every Python file of the package and of the tests, relative to the root."""
    return [
        path.relative_to(root).as_posix() for top in ("src", "tests") for path in sorted((root / top).rglob("*.py"))
    ]


def module_name(path: str) -> str:
    """Return the name under which a file is imported."""
    return ".".join(Path(path).with_suffix("").parts[1:]).removesuffix(".__init__")


def main() -> int:
    """Select the tests, say which, and run them; return the exit code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", help="compare with this revision; by default with the merge base with main")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start no test later than this after collection")
    parser.add_argument("--list", action="store_true", help="list the test files and run none")
    options, arguments = parser.parse_known_args()
    changed = changed_files(options.base or merge_base())
    affected = [path for path in Dependencies(ROOT).tests_of(changed) if path not in ALWAYS]
    near, far = affected[:MAX_FILES], affected[MAX_FILES:]
    print(f"{len(changed)} changed files, {len(affected)} affected test files, {len(far)} of them left to make test")
    if options.list:
        print(*ALWAYS, *near, sep="\n")
        return 0
    sys.stdout.flush()
    limit = f"--stop-after={options.seconds}"
    parallel = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    command = [sys.executable, "-m", "pytest", "-q", *parallel, "-m", "not slow", limit, *arguments, *ALWAYS, *near]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
