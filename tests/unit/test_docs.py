"""Documents name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
TEXTS += [p for place in ("docs", "checkpoints", "scripts", "configs") for p in (ROOT / place).rglob("*.*")]
TEXTS = [path for path in TEXTS if path.suffix in (".md", ".py", ".sbatch", ".yaml", "")]
NAMED = re.compile(r"(?<![\w/])(?:configs|docs|scripts|ldm|adapters|tests)/[\w./-]+\.(?:yaml|md|py|sbatch|png|json)\b")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_text_names_exist(path: Path) -> None:
    named = NAMED.findall(path.read_text(encoding="utf-8"))
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing


def test_links_of_documents_lead_somewhere() -> None:
    broken: list[str] = []
    for path in TEXTS:
        if path.suffix == ".md":
            links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
            broken += [f"{path.name}: {link}" for link in links if not (path.parent / link).exists()]
    assert not broken


def spoken(text: str) -> str:
    """The words of a message or of source code, string literals that follow each other joined."""
    return " ".join(re.sub(r'"\s*f?"', "", text).split())


def test_troubleshooting_quotes_lines_that_the_code_prints() -> None:
    """Values stand between the words of a message: of each run of four words, three in a row are in the code."""
    sources = [p for top in ("ldm", "adapters", "scripts") for p in (ROOT / top).rglob("*.py")]
    code = spoken("\n".join(p.read_text(encoding="utf-8") for p in sources))
    quotes = re.findall(r"`([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    runs = [run.split() for q in quotes for run in re.findall(r"(?:(?<!\S)[A-Za-z,;:]+(?:\s|$)){4,}", spoken(q))]
    assert len(runs) > 30
    assert not [run for run in runs if not any(" ".join(run[i : i + 3]) in code for i in range(len(run) - 2))]
