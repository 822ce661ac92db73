"""What README shows runs as it is typed: its commands, with short settings where they are long, and its Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from ebm_prior.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIVE = "## Your own pretrained VAE in five commands"
SHORT = {  # options that make a long command short
    "doctor": "--samples 800 --pairs 1 --gauge-iterations 40 --gauge-batch-size 64",
    "fit": "--iterations 4 --batch-size 16 --held-out 20 --evaluate-every 2 --sampler-proposals 2 --sampler-steps 1",
    "sample": "-n 4 --proposals 2 --steps 1",
    "eval": "--samples 64 --gauge-iterations 5 --proposals 2 --steps 1",
    "report": "",
}


def blocks(language: str, title: str = "") -> list[str]:
    """The code blocks in `language`, of the whole page or of the section with this title."""
    text = README.partition(title + "\n")[2].partition("\n## ")[0] if title else README
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def pattern_of(line: str) -> re.Pattern[str]:
    """What a line that the page shows as printed looks like, whatever its numbers are and however wide its columns."""
    words = line.removeprefix("# ").split()
    return re.compile(r"\s+".join(re.sub(r"[0-9][0-9.,\\\\]*", "[-+0-9.,]+", re.escape(word)) for word in words))


def test_a_person_reads_it_in_ten_minutes() -> None:
    assert len(README.splitlines()) <= 220


def test_the_five_commands_run_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("console", FIVE)
    lines = commands.splitlines()
    typed, printed = [shlex.split(line) for line in lines[::2]], lines[1::2]
    assert [words[1] for words in typed] == list(SHORT)
    for words, line in zip(typed, printed, strict=True):
        done = CliRunner(catch_exceptions=False).invoke(main, [*words[1:], *shlex.split(SHORT[words[1]])])
        assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}"
        assert pattern_of(line).search(done.output), f"{line}\n{done.output}"
    assert {"prior.safetensors", "report.html"} <= {path.name for path in (tmp_path / "runs/mine").iterdir()}
    assert (tmp_path / "before-after.png").is_file()


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("python", "## From Python")
    short = program.replace("iterations=800", "iterations=4, batch_size=16, held_out=20, evaluate_every=2")
    short = short.replace("sample(64", "sample(4").replace("log_normalizer()", "log_normalizer(n=64)")
    assert short != program
    exec(compile(short, "README.md", "exec"), {"__name__": "__main__"})
    assert "nats" in capsys.readouterr().out


@pytest.mark.parametrize("line", re.findall(r"`ebm-prior ([a-z0-9-]+)", README))
def test_every_command_that_it_names_is_there(line: str, tmp_path: Path) -> None:
    assert line in main.entries or line == "demo"  # type: ignore[attr-defined]


def test_every_section_that_a_message_names_is_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "ebm_prior").rglob("*.py")]
    named = [section for text in texts for section in re.findall(r"\(README: ([^)]+)\)", text)]
    assert named
    assert [section for section in named if f"## {section}\n" not in README] == []


def test_every_page_that_it_links_to_is_there() -> None:
    pages = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert pages
    assert [page for page in pages if not (ROOT / page).exists()] == []
