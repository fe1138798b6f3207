"""Checks what a release would publish: `make release-check`, which builds into dist/ and runs this file.

    python tests/release_check.py dist [--pipeline runs/digits]

The archives must hold the sources as they are. The wheel is installed with its extras into a new environment outside
the source tree, and the code of README.md runs there, beside the examples of the source archive. What cannot run
anywhere is left out by LEFT_OUT, and named. A trained pipeline spares the training; without one the README's commands
train it.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = "train,eval"
# A snippet is left out for the first reason whose pattern is found in it, comments aside.
LEFT_OUT = {
    r"^(make|python -m pytest)\b": "works on the source tree",
    r"^(pip|python3 -m venv) ": "installs",
    r"user/model": "needs an account on the Hub",
    r"my_recipe\.yaml|\.pth\b": "needs a file of the reader's own",
    r"examples/app\.py": "serves until it is stopped",
}
TRAINS = r"examples/train\.py(?!.*--help)"


def archives(folder):
    """The one wheel and the one source archive in a folder."""
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def files_of(*places):
    """The files that belong to a release, as paths from the root of the source tree."""
    found = [path for place in places for path in sorted((ROOT / place).rglob("*")) if path.is_file()]
    kept = [path for path in found if "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in kept}


def check_wheel(path):
    """The wheel holds the package with its types and data, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")]
        assert {name: wheel.read(name) for name in names} == files_of("tarflow_hf"), "the wheel is not the package"
    assert {"tarflow_hf/py.typed", "tarflow_hf/hub/model_card.md.jinja"} <= set(names)
    print(f"ok    {path.name}: {len(names)} files")


def check_source(path, unpacked):
    """The source archive holds what the tests and examples need; it is unpacked for the snippets."""
    with tarfile.open(path) as archive:
        archive.extractall(unpacked, filter="data")
    (top,) = unpacked.iterdir()
    wanted = files_of("tarflow_hf", "tests", "model_cards", "examples/recipes", "examples/data/digits")
    missing = [name for name, content in wanted.items() if not _same(top / name, content)]
    assert not missing, f"missing in the source archive, or not the same: {missing}"
    print(f"ok    {path.name}: {sum(1 for file in top.rglob('*') if file.is_file())} files")
    return top


def _same(path, content):
    return path.is_file() and path.read_bytes() == content


def install(wheel, environment):
    """A new environment with the wheel and its extras; gives the folder of its commands."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    commands = environment / "bin"
    constraints, wanted = ROOT / "constraints.txt", f"{wheel}[{EXTRAS}]"
    subprocess.run([commands / "python", "-m", "pip", "install", "-q", "-c", constraints, wanted], check=True)
    return commands


def snippets(text):
    """The language and the code of each thing that can run alone: a block of Python, or one command of a shell."""
    for language, code in re.findall(r"^```(python|bash)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            yield language, code
        else:
            for line in code.replace("\\\n", " ").splitlines():
                yield language, re.sub(r"\s+#.*", "", line)


def reason_to_leave_out(language, code, *, trained):
    """Why a snippet is left out, or None."""
    plain = ast.unparse(ast.parse(code)) if language == "python" else code  # without comments
    if trained and re.search(TRAINS, plain):
        return "the trained pipeline was given"
    return next((reason for pattern, reason in LEFT_OUT.items() if re.search(pattern, plain)), None)


def run_snippet(language, code, folder, commands):
    """Runs a snippet as a reader would; its output is shown if it fails."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = inherited | {
        "PATH": os.pathsep.join([str(commands), inherited["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "MPLBACKEND": "agg",
    }
    command = [commands / "python", "-c", code] if language == "python" else ["bash", "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        print(done.stdout)
    return done.returncode == 0


def main(arguments):
    """Checks the archives in a folder; the exit status says whether they can be released."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one wheel and one source archive")
    parser.add_argument("--pipeline", type=Path, help="trained pipeline, in place of the README's training")
    options = parser.parse_args(arguments)
    wheel, source = (path.resolve() for path in archives(options.dist))
    check_wheel(wheel)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        unpacked = check_source(source, place / "source")
        folder = place / "work"
        shutil.copytree(unpacked / "examples", folder / "examples")
        if options.pipeline:
            shutil.copytree(options.pipeline, folder / "runs/digits", ignore=shutil.ignore_patterns("checkpoints"))
        commands = install(wheel, place / "environment")
        counts = {"ran": 0, "failed": 0, "left out": 0}
        for language, code in snippets((unpacked / "README.md").read_text(encoding="utf-8")):
            reason = reason_to_leave_out(language, code, trained=bool(options.pipeline))
            fate = "left out" if reason else "ran" if run_snippet(language, code, folder, commands) else "failed"
            counts[fate] += 1
            print(f"{fate:8}  {code.strip().splitlines()[0]}{f'  ({reason})' if reason else ''}", flush=True)
    print("README.md: " + ", ".join(f"{count} {fate}" for fate, count in counts.items()))
    return counts["failed"] > 0 or counts["ran"] == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
