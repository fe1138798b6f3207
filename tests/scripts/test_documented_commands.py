"""The commands of README.md and examples/README.md: their files exist and their options are known to the scripts."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITH_SUBCOMMANDS = (
    "examples.benchmark",
    "examples.latents",
    "examples.data.classifiers",
    "examples.data.elevation",
    "examples.data.photo_strips",
)


def documented_commands():
    """The words of every command that starts one of our scripts, in code spans and blocks."""
    for name in ("README.md", "examples/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"(?:python|accelerate launch) [^`\n#]*(?:examples/|-m tarflow_hf)[^`\n#]*", text):
            yield shlex.split(command)


def script_of(words):
    """The module that a command starts, and what it is told."""
    if "-m" in words:
        place = words.index("-m") + 1
        return words[place], words[place + 1 :]
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[place]).is_file(), f"{words[place]} does not exist"
    return words[place].removesuffix(".py").replace("/", "."), words[place + 1 :]


@pytest.mark.parametrize("words", list(documented_commands()), ids=" ".join)
def test_a_command_names_files_and_options_that_exist(words, capsys):
    module, told = script_of(words)
    for word in told:
        path = word.partition(":")[0]
        assert not path.startswith("examples/") or (ROOT / path).exists(), f"{path} does not exist"
    subcommand = told[:1] if module in WITH_SUBCOMMANDS else []
    with pytest.raises(SystemExit):
        importlib.import_module(module).main([*subcommand, "--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert {word.partition("=")[0] for word in told if word.startswith("--")} <= known
