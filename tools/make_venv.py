"""Makes `.venv` for this checkout: `PYTHON tools/make_venv.py TORCH`. Called by the Makefile; uses only the standard library.

If the Python that runs this file already imports torch 2.11 or newer, that torch is used, with whatever else is installed beside
it: a cluster's own build, on machines that reach no package index. Otherwise TORCH, pip's arguments for a torch, is installed
first. Every later installation is held to the torch that is there, so that none brings another.
"""

from __future__ import annotations  # a Python too old to run this file still reads it, and can say so

import re
import shlex
import subprocess
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
CHECKOUT = Path(__file__).resolve().parent.parent
VENV = CHECKOUT / ".venv"
PYTHON = VENV / "bin" / "python"
KNOBS = VENV / "knobs.mk"  # what .venv was made with; the Makefile's defaults from then on
READY = VENV / "ready"  # touched by the Makefile when this program succeeds


def importable_torch() -> str | None:
    """The version of the torch that this Python imports, or None where it has none, a broken or a too old one."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a shared library that does not load
        return None
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return torch.__version__ if numbers and tuple(map(int, numbers.groups())) >= OLDEST_TORCH else None


def share_packages() -> None:
    """Lets `.venv` see, after its own packages, those of this Python.

    Not --system-site-packages, which shows the packages of the installation below when this Python lives in a venv itself.
    """
    import torch

    folders = [str(Path(torch.__file__).parent.parent)]
    folders += [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    own = next(VENV.glob("lib/python*/site-packages"))
    (own / "shared.pth").write_text("".join(f"{folder}\n" for folder in dict.fromkeys(folders)))


def pip(*arguments: str) -> None:
    """Runs `.venv`'s pip, showing what it prints; ends this program where pip fails."""
    done = subprocess.run([PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments], cwd=CHECKOUT, check=False)
    if done.returncode:
        sys.exit(
            f"\nfailed: pip {shlex.join(arguments)}\nWithout a package index, {sys.executable} itself must have torch and the "
            "dependencies listed in pyproject.toml; another Python is chosen with: make PYTHON=..."
        )


def install_torch(arguments: list[str]) -> None:
    """Shares this Python's torch, or installs one; then holds every later installation to its exact version."""
    if version := importable_torch():
        print(f"using torch {version} of {sys.executable}", flush=True)
        share_packages()
    else:
        pip("install", *arguments)
    ask = [PYTHON, "-c", "from importlib.metadata import version; print(version('torch'))"]
    present = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    (VENV / "constraints.txt").write_text(f"torch=={present}\n")


def install_paraxis() -> None:
    """Installs our dependencies and this checkout. Touches no package index where all of them are there already."""
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    pip("install", "--quiet", "--constraint", ".venv/constraints.txt", *needed)
    pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")


def main() -> None:
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}, but 3.11 or newer is needed: make PYTHON=...")
    arguments = shlex.split(sys.argv[1])
    asked = f"# for the Python of {sys.prefix}\nTORCH ?= {shlex.join(arguments)}\n"
    made_with = KNOBS.read_text().partition("PYTHON")[0] if KNOBS.exists() else asked
    if made_with != asked:
        sys.exit(f".venv was made with\n{made_with}and cannot become\n{asked}To make it anew: make clean, then this again")
    if READY.exists() and READY.stat().st_mtime >= (CHECKOUT / "pyproject.toml").stat().st_mtime:
        return
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        if sys.version_info < (3, 12):
            # Until 3.12 a venv comes with a setuptools too old to build this project, which would hide a newer one that is shared.
            pip("uninstall", "--quiet", "--yes", "setuptools")
    install_torch(arguments)
    KNOBS.write_text(f"{asked}PYTHON ?= {sys.executable}\n")
    install_paraxis()


main()
