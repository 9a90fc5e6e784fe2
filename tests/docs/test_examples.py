"""The Python of docs/python.md runs, each example by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.story import ROOT, Block, blocks

EXAMPLES = [block for block in blocks(ROOT / "docs" / "python.md") if block.language == "python"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda block: f"line{block.line}")
def test_an_example_of_the_python_page(example: Block, tmp_path: Path) -> None:
    source = "\n".join(example.text)
    compile(source, example.where, "exec")
    if example.not_run:
        return
    script = tmp_path / "example.py"
    script.write_text(source)
    result = subprocess.run([sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True,
                            timeout=50, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert result.returncode == 0, result.stderr
