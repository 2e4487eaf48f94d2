"""What the pages say is true: the map names every file, commands exist, quoted lines are those of the code."""

import importlib
import re
import sys
import textwrap

import pytest
from conftest import ROOT, save_model

README = (ROOT / "README.md").read_text()


def test_readme_is_short_and_maps_every_file():
    assert len(README.splitlines()) <= 150
    files = [path.relative_to(ROOT) for place in (".", "support", "tools") for path in (ROOT / place).glob("*.py")]
    named = README.split("## What is where")[1].split("## ")[0]
    for path in files:
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.stem}\b", named), path


def test_every_command_on_the_pages_exists():
    for page in ROOT.glob("*.md"):
        for tool in re.findall(r"python -m tools\.([a-z]\w*)", page.read_text()):
            assert (ROOT / "tools" / f"{tool}.py").exists(), (page, tool)
        for link in re.findall(r"\]\(([^)#]+)\)", re.sub("```.*?```", "", page.read_text(), flags=re.S)):
            assert link.startswith("http") or (ROOT / link).exists(), (page, link)


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("[a-z]*.py")))
def test_every_tool_explains_itself(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"tools.{tool}").main()
    assert f"python -m tools.{tool}" in capsys.readouterr().out


def test_every_quotation_is_what_the_file_says():
    blocks = re.findall(r"```python\n# (\S+\.py)(?:, ([\w.]+))?\n(.*?)```", (ROOT / "READING.md").read_text(), re.S)
    assert len(blocks) >= 15
    for name, place, quoted in blocks:
        text = (ROOT / name).read_text()
        for part in place.split(".") if place else ():
            text = text[re.search(rf"^ *(?:def|class) {part}\b", text, re.M).start() :]
        indents = re.findall(rf"^( *){re.escape(quoted.splitlines()[0])}$", text, re.M)
        assert any(textwrap.indent(quoted, indent) in text for indent in indents), (name, quoted)


def test_the_python_lines_run(tmp_path, monkeypatch):
    (tmp_path / "runs/gcnet-r18-shapes").mkdir(parents=True)
    save_model(tmp_path / "runs/gcnet-r18-shapes/best.pt", "gcnet")
    monkeypatch.chdir(tmp_path)
    values = {}
    (lines,) = re.findall("```python\n(.*?)```", README, re.S)
    exec(lines.replace("512, 683", "40, 52"), values)
    assert values["probabilities"].shape == (2, 3, 40, 52) and values["logits"].shape == (2, 3, 5, 7)
    assert (values["probabilities"].sum(1) - 1).abs().max() < 1e-5 and values["loss"].requires_grad


def test_uv_and_pip_install_the_same():
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[.*?\n(.*?)^\]", text, re.M | re.S)[1]
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert re.findall(r'^    "(.*)",$', declared, re.M) == [line.partition("#")[0].strip() for line in required]
