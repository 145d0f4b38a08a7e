"""The README's example runs as it stands, and is as short as it says."""

import re
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    before, after = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert after < before
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
