"""Checks that two wheels hold the same files, and every tracked file of the packages: compare_wheels.py A.whl B.whl"""

from __future__ import annotations

import subprocess
import sys
import zipfile

FOLDERS = {
    "llava_sparse/": "llava_sparse/",
    "modeling/": "llava_sparse/modeling/",
    "processing/": "llava_sparse/processing/",
    "llava_sparse_cli.py": "llava_sparse_cli.py",
    "llava_sparse_commands.py": "llava_sparse_commands.py",
}


def contents(wheel: str) -> dict[str, int]:
    """Name and checksum of each file."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def tracked() -> set[str]:
    """The names that the tracked files of the packages have in a wheel."""
    output = subprocess.run(["git", "ls-files", *FOLDERS], check=True, capture_output=True, text=True).stdout
    return {
        target + name.removeprefix(source)
        for name in output.splitlines()
        for source, target in FOLDERS.items()
        if name.startswith(source)
    }


def main() -> None:
    first, second = (contents(wheel) for wheel in sys.argv[1:])
    different = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    packaged = {name for name in first if not name.split("/")[0].endswith(".dist-info")}
    problems = {
        "different in the two wheels": different,
        "tracked, but not in the wheel": sorted(tracked() - packaged),
        "in the wheel, but not tracked": sorted(packaged - tracked()),
    }
    for problem, names in problems.items():
        if names:
            print(f"{problem}: {', '.join(names)}")
    if any(problems.values()):
        sys.exit(1)
    print(f"{len(packaged)} files, the same in both wheels and in git")


if __name__ == "__main__":
    main()
