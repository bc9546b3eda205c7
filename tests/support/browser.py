"""A real browser for pages."""

import importlib.util
import shutil

import pytest


def find_browser(*packages: str) -> str:
    """Its path. Skips the test, naming what is missing, where the page cannot be opened."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, names)), None)
    packages = (*packages, "playwright")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    missing += [] if browser else ["chromium (or Chrome)"]
    if missing or browser is None:
        advice = "pip install -r requirements-demo.txt playwright; apt-get install chromium"
        pytest.skip(f"the page is not opened: {', '.join(missing)} not installed ({advice})")
    return browser


# Debian's Chromium asks its maker for updates at every start.
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
