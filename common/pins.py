"""The package versions that requirements.txt pins, compared with the installed ones."""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.errors import UserError

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
PARTS = {"mujoco": ("mujoco-core",)}  # packages that newer releases of a package are split into


def pinned_versions() -> dict[str, str]:
    """Return {package: version} of the lines `package==version` of requirements.txt."""
    if not REQUIREMENTS.exists():
        return {}
    return dict(re.findall(r"^([\w.-]+)==([\w.+!-]+)", REQUIREMENTS.read_text(), re.MULTILINE))


def installed_version(package: str) -> str:
    """Return the installed version of a package, or "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def check_installed(packages: Iterable[str]) -> None:
    """Check packages against requirements.txt. Packages that are not installed pass.

    Raises UserError for another version, and for the parts that another version has left behind.
    """
    pins = pinned_versions()
    for package in packages:
        pin = pins.get(package)
        installed = installed_version(package)
        if not (pin and installed):
            continue
        if installed != pin:
            raise UserError(
                f"{package} {installed} is installed, but requirements.txt pins {pin}: "
                f"run pip install {package}=={pin}, or change the pin to use another version"
            )
        for part in PARTS.get(package, ()):
            leftover = installed_version(part)
            if leftover and leftover != pin:
                raise UserError(
                    f"{package} {installed} is installed over {part} {leftover}, and the two do not work together: run "
                    f"pip uninstall --yes {package} {part}, then pip install {package}=={pin}"
                )
