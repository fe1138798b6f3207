"""A training run that uploads its checkpoints and its end to the loopback Hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hub.loopback import LoopbackHub

pytestmark = pytest.mark.xdist_group("hub")
TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
SMALL = "--hidden_size 64 --num_blocks 2 --layers_per_block 1 --eval_images 10 --sample_columns 1 --max_steps 4"
LOOK = """
import json
from huggingface_hub import HfApi, ModelCard
from tarflow_hf import TarFlowPipeline
api, name = HfApi(), "alice/digits"
titles = [commit.title for commit in api.list_repo_commits(name)]
pipe, card = TarFlowPipeline.from_pretrained(name), ModelCard.load(name)
print(json.dumps([titles, api.list_repo_files(name), card.text, card.data.eval_results[0].metric_type,
                  pipe.transformer.config.num_classes]))
"""


def python(hub, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=hub.home, env=hub.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_run_is_pushed_at_checkpoints_and_at_the_end(tmp_path):
    with LoopbackHub(tmp_path) as hub:
        options = f"{SMALL} --output_dir digits --checkpoint_every 2 --push_to_hub --push_checkpoints"
        last = python(hub, str(TRAIN), *options.split())
        titles, files, text, metric, classes = json.loads(python(hub, "-c", LOOK))
    assert last.startswith("http")
    assert titles == ["Upload TarFlowPipeline", "Step 2", "initial commit"]
    assert {"samples.png", "curve.png", "metrics.jsonl", "recipe.yaml", "README.md"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoints", "grids"))]
    assert "![Samples](samples.png)" in text
    assert "![Bits per dimension over the training](curve.png)" in text
    assert 'from_pretrained("alice/digits")' in text
    assert "| batch_size | 64 |" in text
    assert (metric, classes) == ("noisy_bits_per_dim", 10)
