"""Commands of README and docs: they parse, their files exist, and a fresh clone can run them unless they say why not.

A command stands in a block of code, fenced or indented. What it needs that a fresh clone has not is said by a mark,
`# needs: data`, behind it or alone in a line of its block above it, or for a whole document by a line "All commands
here need: data, time." Words: see WORDS. `ablate.py` says it by its budget.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import adapters  # noqa: F401  (registers them)
from ldm import build, config, registry
from ldm.ablation import commands as ablations
from ldm.ablation import table as tables
from ldm.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS += sorted((ROOT / "checkpoints").glob("*/README.md"))
WORDS = {"GPU", "weights", "data", "network", "run", "time", "SLURM", "file", "browser"}
STARTS = re.compile(r"(?:\w+=\S+ )*(?:python3? |torchrun |make |pytest |sbatch )")
NEEDS = re.compile(r"#\s*needs: (.+)$")
ALL_NEED = re.compile(r"^All commands here need: ([\w, ]+)\.$", re.MULTILINE)
PLACEHOLDER = re.compile(r"(?:^|[=/])[A-Z][A-Z_]+(?:\.\w+)?$|\.\.\.")  # FILE, weights=YOUR_FILE
SMALL = ["train.steps=2", "train.ema=null", "data.length=16", "validation.items=2", "validation.images=1"]


@dataclass(frozen=True)
class Command:
    """One command of a document, its words without comments."""

    where: str
    words: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def script(self) -> str | None:
        found = [Path(word).stem for word in self.words if re.fullmatch(r"scripts/\w+\.(py|sbatch)", word)]
        return found[0] if found else None

    @property
    def arguments(self) -> list[str]:
        start = next(i for i, word in enumerate(self.words) if word.startswith("scripts/"))
        return list(self.words[start + 1 :])

    @property
    def sketched(self) -> bool:
        return any(PLACEHOLDER.search(word) for word in self.words)


def blocks(text: str) -> Iterator[list[str]]:
    """Lines of each block of code, fenced or indented by four, without the indent."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield block.splitlines()
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^ {4}\S[^\n]*\n(?:^ {4,}[^\n]*\n)*)", plain, re.MULTILINE):
        yield [line[4:] for line in block.splitlines()]


def commands(path: Path) -> Iterator[Command]:
    """The commands of a document; a description behind three spaces or a # is no part of one."""
    text = path.read_text(encoding="utf-8")
    everywhere = ALL_NEED.search(text)
    for block in blocks(text):
        whole = tuple(everywhere[1].split(", ")) if everywhere else ()
        for line in "\n".join(block).replace("\\\n", " ").splitlines():
            marked = NEEDS.search(line)
            words = tuple(re.split(r",\s*", marked[1])) if marked else ()
            if marked and line.lstrip().startswith("#"):
                whole = words
            if STARTS.match(line):
                bare = re.split(r"\s{3,}|\s+(?:#|[>|]|&&)\s|\)$", line)[0]
                split = tuple(word for word in shlex.split(bare) if word not in (";",))
                yield Command(f"{path.relative_to(ROOT)}: {bare[:90]}", split, words or whole)


def shown(command: Command) -> str:
    return command.where


EVERY = [command for path in TEXTS for command in commands(path)]
SCRIPTS = [command for command in EVERY if command.script]
FREE = [c for c in SCRIPTS if not c.needs and not c.sketched and c.script != "ablate"]


class Parsed(Exception):  # noqa: N818  (no error: it stops a script behind its argument parser)
    pass


def parsed(command: Command, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the script's own parser makes of the arguments; nothing of the script runs behind it."""

    def stopping(parse: Any) -> Any:
        def stop(self: argparse.ArgumentParser, argv: Any = None) -> None:
            raise Parsed(parse(self, argv))

        return stop

    script = "train" if command.words[0] == "sbatch" else command.script
    main = importlib.import_module(f"scripts.{script}").main
    with monkeypatch.context() as patch, pytest.raises(Parsed) as stopped:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        main(command.arguments)
    return stopped.value.args[0]


def loaded(command: Command, args: argparse.Namespace) -> RunConfig | None:
    """The config that the command names, every key of it accepted; None if it names none."""
    if command.script == "ablate":
        return check_ablation(args)
    path = getattr(args, "config", None)
    if path is None and command.script == "sample" and not getattr(args, "run", None):
        path = ROOT / "configs" / "sample" / "emoji" / "ldm.yaml"
    if path is None or getattr(args, "command", "") == "check":
        return None
    cfg = config.load(path, getattr(args, "overrides", []))
    build.uses(cfg)
    for node in (cfg.data, cfg.validation.data):
        if node is not None:
            registry.options("data", node)
    return cfg


def check_ablation(args: argparse.Namespace) -> None:
    words = [word for word in args.words if "=" not in word]
    if args.config is None:
        assert words[0] in ablations.COMMANDS
        assert len(words) == 3 or (words[0] == "compare" and len(words) == 4)
        return
    budget = next((w.partition("=")[2] for w in args.words if w.startswith("budget=")), "short")
    keys = [word for word in args.words if not word.startswith("budget=")]
    found = tables.files(Path(args.config))
    for file in found if len(found) == 1 else found[:1]:  # tests/unit/ablation loads every table
        tables.load(file, budget, keys, args.seeds)


def missing(command: Command, cfg: RunConfig | None, args: argparse.Namespace) -> list[str]:
    """What a fresh clone does not have of what the command reads."""
    if getattr(args, "picture", None):
        return ["that picture"]
    if any(getattr(args, name, False) for name in ("dry_run", "print_config", "explain")):
        return []
    lacks = [f"run folder {args.run}"] if getattr(args, "run", None) else []
    lacks += ["a published file, the network or a run"] if command.script == "convert" else []
    lacks += ["hours, and diffusers"] if command.script == "benchmark" else []
    lacks += ["pictures"] if getattr(args, "images", None) or getattr(args, "command", "") in ("emoji", "check") else []
    if cfg is None:
        return lacks
    nodes = [cfg.adapters, cfg.model.unet, cfg.model.vae, cfg.model.text]
    files = [ROOT / file for file in re.findall(r'"weights": "([^"]+)"', json.dumps(nodes))]
    lacks += [str(file) for file in files if not file.is_file() or file.parent.name not in ("emoji", "tiny")]
    if command.script != "sample" and cfg.data is not None and cfg.data["name"] != "synthetic":
        lacks.append(str(cfg.data.get("root", "data")))
    if command.script == "evaluate":
        lacks.append(cfg.run.dir)
    lacks += [str(file) for file in cfg.sample.hints.values() if not (ROOT / str(file)).exists()]
    return lacks


def test_commands_are_found_in_both_kinds_of_block() -> None:
    assert len(SCRIPTS) > 40
    assert {"train", "sample", "evaluate", "prepare_data", "convert"} <= {c.script for c in SCRIPTS}
    found = list(blocks("```\npython a.py\n```\ntext\n\n    make b\n    more\n\ntext\n"))
    assert found == [["python a.py"], ["make b", "more"]]


@pytest.mark.parametrize("command", EVERY, ids=shown)
def test_marks_are_words_that_are_known(command: Command) -> None:
    assert {word.split()[0] for word in command.needs} <= WORDS, f"allowed: {', '.join(sorted(WORDS))}"


@pytest.mark.parametrize("command", SCRIPTS, ids=shown)
def test_command_parses_and_runs_in_a_fresh_clone_unless_it_is_marked(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any((ROOT / "scripts" / f"{command.script}.{end}").is_file() for end in ("py", "sbatch"))
    if command.sketched:
        return
    monkeypatch.chdir(ROOT)
    args = parsed(command, monkeypatch)
    lacks = missing(command, loaded(command, args), args)
    assert command.needs or not lacks, f"{command.where} needs {lacks}: mark it, e.g. `# needs: data`"


@pytest.mark.parametrize("command", [c for c in EVERY if not c.script], ids=shown)
def test_other_commands_name_targets_and_tests_that_exist(command: Command) -> None:
    if command.words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert command.words[1] in targets
    for word in command.words:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", FREE, ids=shown)
def test_unmarked_command_runs(command: Command, tmp_path: Path) -> None:
    for name in ("configs", "checkpoints", "scripts", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    extra = SMALL if command.script == "train" and not {"--dry-run", "--explain"} & set(command.words) else []
    words = [sys.executable if word.startswith("python") else word for word in command.words if word != "torchrun"]
    done = subprocess.run(
        [*words, *extra],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
