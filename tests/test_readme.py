"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run_in_order(capsys):
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, README.name, "exec"), namespace)
    assert "int4w-pt-minmax" in capsys.readouterr().out
    assert float(namespace["loss"]) < 2.3
