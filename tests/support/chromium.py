"""Pages in a headless Chromium."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAME = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
needs_chromium = pytest.mark.skipif(NAME is None, reason="Chromium is not installed (Debian: apt-get install chromium)")


def document_of(page: Path, fragment: str) -> str:
    """What a page's document has become once its scripts have run."""
    assert NAME is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(NAME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=900,900"),
            *(f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}#{fragment}"),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
