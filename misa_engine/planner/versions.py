"""Versions of the libraries whose operations the closed formulas describe, and a note where others are installed."""

from __future__ import annotations

from importlib import metadata

#: Package -> version whose forward and backward pass ``activations.py`` follows, operation by operation.
DESCRIBED = {"transformers": "5.23", "trl": "1.16", "liger-kernel": "0.8.5"}


def installed_versions() -> dict[str, str]:
    """Installed versions of the packages in ``DESCRIBED``; those that are missing are left out."""
    found = {}
    for package in DESCRIBED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def other_versions() -> str | None:
    """A sentence naming the packages that are installed in another version than the formulas describe, or None."""
    installed = installed_versions()
    others = [
        f"{package} {installed[package]} (described: {described})"
        for package, described in DESCRIBED.items()
        if package in installed and not f"{installed[package]}.".startswith(f"{described}.")
    ]
    if not others:
        return None
    return (
        f"the formulas of the plan describe other versions than are installed: {', '.join(others)}. A newer one may "
        "keep other activations; leave a margin, or compare with the peak that a short run prints."
    )
