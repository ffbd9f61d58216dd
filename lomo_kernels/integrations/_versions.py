"""Which versions of a trainer an integration was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def require(package: str, first: str, before: str) -> None:
    """Raises ImportError unless `package` is installed in a version from `first` up to, but not including, `before`."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "none"
    if installed == "none" or not _numbers(first) <= _numbers(installed) < _numbers(before):
        raise ImportError(
            f"Lomo: this integration was tested with {package} {first} and newer, before {before}; installed is "
            f"{installed}. Run: pip install '{package}>={first},<{before}'"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version: "1.15.0.dev0" gives (1, 15)."""
    major, minor = [*text.split("."), "0"][:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)
