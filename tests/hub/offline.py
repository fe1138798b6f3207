"""Client, to be run with HF_HUB_OFFLINE=1: loads from the cache what another process downloaded."""

import json

from transformers import AutoModel

from hub.client import refusal, samples
from tarflow_hf import TarFlowPipeline


def main() -> None:
    facts = {
        "samples": samples(TarFlowPipeline.from_pretrained("alice/flow")),
        "tag": samples(TarFlowPipeline.from_pretrained("alice/flow", revision="v1")),
        "variant": str(TarFlowPipeline.from_pretrained("alice/flow", variant="bf16").transformer.dtype),
        "model": type(AutoModel.from_pretrained("alice/flow", subfolder="transformer")).__name__,
        "never seen": refusal(lambda: TarFlowPipeline.from_pretrained("alice/folder")),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
