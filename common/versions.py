"""The versions of the packages that make a result."""

from importlib.metadata import version
from importlib.util import find_spec

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "gymnasium",
    "numpy",
)  # the packages of an environment are in its domain's PROTOCOL


def versions() -> dict[str, str]:
    """Return {package: version}, without packages that are not installed."""
    return {name: version(name) for name in PACKAGES if find_spec(name)}
