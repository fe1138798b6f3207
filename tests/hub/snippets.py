"""Client: pushes a tiny checkpoint under the name each page uses, then runs the page's code as it stands there."""

import json
import re
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from PIL import Image

from tarflow_hf import TarFlowConfig, TarFlowModel, TarFlowPipeline


def tiny_pipeline(page: dict) -> TarFlowPipeline:
    """A model with the channels, classes and kind of noise of the page's own, and little else."""
    config = TarFlowConfig(
        image_size=8, patch_size=4, hidden_size=16, num_blocks=1, layers_per_block=1, head_dim=8, **page
    )
    return TarFlowPipeline(transformer=TarFlowModel(config).eval())


def run(path: Path, kind: dict) -> list[str]:
    """The sizes and modes of the pictures that the page's code leaves, or the shape of its arrays."""
    text = ModelCard.load(path).text
    (repo_id,) = set(re.findall(r'from_pretrained\("([^"]+)"\)', text))
    tiny_pipeline(kind).push_to_hub(repo_id)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        seen: dict = {"torch": torch}
        for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(compile(code, str(path), "exec"), seen)
        if kind["value_scale"] is not None:
            return [f"array {seen['values'].shape}"]
        return sorted(f"{Image.open(name).mode} {Image.open(name).size}" for name in Path().glob("*.png"))


def main() -> None:
    pages = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({path: run(Path(path), kind) for path, kind in pages.items()}))


if __name__ == "__main__":
    main()
