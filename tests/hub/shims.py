"""Client that knows diffusers and transformers alone: files in the repository bring in the package, or ask for it."""

import json
import sys

from diffusers import DiffusionPipeline
from transformers import AutoConfig, AutoModel

LOADERS = {
    "pipeline": lambda: DiffusionPipeline.from_pretrained("alice/flow", trust_remote_code=True),
    "variant": lambda: DiffusionPipeline.from_pretrained("alice/flow", variant="bf16", trust_remote_code=True),
    "model": lambda: AutoModel.from_pretrained("alice/flow", subfolder="transformer", trust_remote_code=True),
    "config": lambda: AutoConfig.from_pretrained("alice/flow", subfolder="transformer", trust_remote_code=True),
}


def outcomes() -> dict[str, list[str]]:
    results = {}
    for name, load in LOADERS.items():
        try:
            loaded = load()
        except Exception as error:
            results[name] = [type(error).__name__, str(error)]
        else:
            results[name] = [type(loaded).__module__, type(loaded).__name__]
    return results


def main() -> None:
    assert "tarflow_hf" not in sys.modules
    sys.modules["tarflow_hf"] = None  # what Python itself does with a name that is not to be imported
    facts = {"without the package": outcomes()}
    del sys.modules["tarflow_hf"]
    facts["with the package"] = outcomes()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
