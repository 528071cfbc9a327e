"""Refuse a release that is not ready: say what is missing, one sentence each, and exit with 1.

    python .ci/release_check.py

The version is that of src/bigbatch/__init__.py. Ready: a final version, a dated section of CHANGELOG.md with entries,
nothing left under Unreleased, the same version and date in CITATION.cff, no uncommitted change, no tag of that
version on another commit, and no tag of another version on this one.
"""

import ast
import re
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION_FILE = "src/bigbatch/__init__.py"


def read_version(root: Path) -> str:
    """Return the value of `__version__`, without importing the package."""
    tree = ast.parse((root / VERSION_FILE).read_text(encoding="utf-8"))
    values = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if any(isinstance(target, ast.Name) and target.id == "__version__" for target in node.targets)
    ]
    if len(values) != 1 or not isinstance(values[0], str):
        sys.exit(f"{VERSION_FILE} must assign one text to __version__.")
    return values[0]


def sections(changelog: str) -> dict[str, str]:
    """Return the text of each section of a changelog by its heading: `[0.2.0] - 2026-12-01`."""
    parts = re.split(r"^## (.+)$", changelog, flags=re.MULTILINE)[1:]
    return {heading.strip(): body for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def changelog_problems(changelog: str, version: str, today: date) -> list[str]:
    """Return a sentence for each reason why a changelog does not describe a version."""
    found = sections(changelog)
    problems = []
    if re.search(r"^[-*] ", found.get("[Unreleased]", ""), flags=re.MULTILINE):
        problems.append(f"CHANGELOG.md has entries under [Unreleased]: move them to a section of {version}.")
    headings = [heading for heading in found if heading.startswith(f"[{version}]")]
    if not headings:
        return [*problems, f"CHANGELOG.md has no section for {version}: write ## [{version}] - {today.isoformat()}."]
    (heading, *_) = headings
    dated = re.fullmatch(r"\[.+\] - (\d{4}-\d{2}-\d{2})", heading)
    try:
        day = date.fromisoformat(dated[1]) if dated else None
    except ValueError:
        day = None
    if day is None:
        problems.append(f"## {heading} in CHANGELOG.md has no date: write ## [{version}] - {today.isoformat()}.")
    elif day > today:
        problems.append(f"## {heading} in CHANGELOG.md is dated later than today, {today.isoformat()}.")
    if not re.search(r"^[-*] ", found[heading], flags=re.MULTILINE):
        problems.append(f"## {heading} in CHANGELOG.md has no entry.")
    return problems


def citation_problems(citation: str, changelog: str, version: str) -> list[str]:
    """Return a sentence if CITATION.cff has another version than the package, or another date than its section."""
    found = dict(re.findall(r'^(version|date-released): "?([^"\n]+)"?$', citation, flags=re.MULTILINE))
    problems = []
    if found.get("version") != version:
        problems.append(f"CITATION.cff has the version {found.get('version')}: write version: {version}.")
    dated = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", changelog, flags=re.MULTILINE)
    if dated and found.get("date-released") != dated[1]:
        problems.append(f'CITATION.cff has the date {found.get("date-released")}: write date-released: "{dated[1]}".')
    return problems


def repository_problems(root: Path, version: str) -> list[str]:
    """Return a sentence for each reason why the last commit cannot be tagged with a version."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    problems = []
    if changed := git("status", "--porcelain").splitlines():
        problems.append(f"the working tree has {len(changed)} uncommitted changes: commit or remove them.")
    tag = f"v{version}"
    if git("tag", "--list", tag) and git("rev-parse", f"{tag}^{{commit}}") != git("rev-parse", "HEAD"):
        problems.append(f"{tag} is the tag of another commit: raise __version__ in {VERSION_FILE}.")
    for other in git("tag", "--points-at", "HEAD").splitlines():
        if re.fullmatch(r"v\d.*", other) and other != tag:
            problems.append(f"the last commit has the tag {other}, and its version is {version}: tag it {tag}.")
    return problems


def problems_of(root: Path, today: date) -> list[str]:
    """Return a sentence for each reason why a repository is not ready for a release; none if it is."""
    version = read_version(root)
    found = []
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        found.append(f"the version {version} in {VERSION_FILE} is not final: write X.Y.Z.")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found += changelog_problems(changelog, version, today)
    found += citation_problems((root / "CITATION.cff").read_text(encoding="utf-8"), changelog, version)
    return found + repository_problems(root, version)


def main() -> None:
    """Print the version if it is ready, and exit with the problems otherwise."""
    if problems := problems_of(ROOT, datetime.now(UTC).date()):
        sys.exit("\n".join(problems))
    print(f"{read_version(ROOT)} is ready: build it with make dist, and tag the commit v{read_version(ROOT)}")


if __name__ == "__main__":
    main()
