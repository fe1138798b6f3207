"""Damaged folders of pipelines and models, loaded by each class that loads them."""

import json
import struct

import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from bad_inputs import Bad, saved_pipeline
from tarflow_hf import TarFlowModel, TarFlowPipeline

CONFIG, INDEX, WEIGHTS = "transformer/config.json", "model_index.json", "transformer/model.safetensors"


def pipeline(name, damage, message, error=OSError, **arguments):
    """A row: a saved pipeline is damaged, then loaded."""

    def call(parent):
        folder = saved_pipeline(parent)
        damage(folder)
        TarFlowPipeline.from_pretrained(folder, **arguments)

    return Bad(name, call, error, message)


def model(name, damage, message, error=OSError, load=TarFlowModel.from_pretrained, **arguments):
    """A row: the model of a saved pipeline is damaged, then loaded straight from its folder."""

    def call(parent):
        folder = saved_pipeline(parent)
        damage(folder)
        load(folder / "transformer", **arguments)

    return Bad(name, call, error, message)


def shards_beside_whole_weights(folder):
    whole = (folder / WEIGHTS).read_bytes()
    TarFlowModel.from_pretrained(folder / "transformer").save_pretrained(folder / "transformer", max_shard_size="20KB")
    (folder / WEIGHTS).write_bytes(whole)


def processor(name, content, message, error=OSError):
    """A row: the settings of a saved model's image processor are these."""

    def call(parent):
        folder = saved_pipeline(parent) / "transformer"
        (folder / "preprocessor_config.json").write_text(content)
        AutoImageProcessor.from_pretrained(folder)

    return Bad(f"image processor with {name}", call, error, message)


def nothing(folder):
    pass


def text(path, content):
    return lambda folder: (folder / path).write_text(content, encoding="utf-8")


def setting(path, **values):
    """Changes entries of a JSON file; ... removes one."""

    def damage(folder):
        content = json.loads((folder / path).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not ...}
        (folder / path).write_text(json.dumps(kept))

    return damage


def tensors(change):
    """Saves the weights again, changed."""

    def damage(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def one(key, value):
    return tensors(lambda state: state.update({key: value}))


def numbers(value, key="blocks.1.proj_in.weight"):
    return tensors(lambda state: state[key].view(-1)[3:4].fill_(value))


def header(change):
    """Writes the header again, changed; a change may give the text of it."""

    def damage(folder):
        content = (folder / WEIGHTS).read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8:start])
        written = change(entries)
        written = json.dumps(entries) if not isinstance(written, str) else written
        encoded = written.encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[start:])

    return damage


def entry(**values):
    """Changes the header's entry of the first tensor; ... removes a part of it."""

    def change(entries):
        first = entries[min(entries.keys() - {"__metadata__"})]
        first.update(values)
        for key in [key for key, value in values.items() if value is ...]:
            del first[key]

    return header(change)


def twice(entries):
    """The same tensor a second time."""
    name = min(entries.keys() - {"__metadata__"})
    return json.dumps(entries)[:-1] + f', "{name}": {json.dumps(entries[name])}}}'


def overlapping(entries):
    names = sorted(entries.keys() - {"__metadata__"}, key=lambda name: entries[name]["data_offsets"])
    entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]


def shards(change):
    """Saves the pipeline in shards, and changes their index."""

    def damage(folder):
        pipe = TarFlowPipeline(transformer=tiny_model(dtype=torch.float32))
        pipe.save_pretrained(folder, max_shard_size="20KB")
        path = folder / "transformer/model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index, folder / "transformer")
        path.write_text(json.dumps(index))

    return damage


def renamed_shard(name):
    def change(index, folder):
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)

    return shards(change)


def changed_places(index, folder):
    first, *_, last = sorted(set(index["weight_map"].values()))
    key = min(key for key, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][key] = last


DEEP = "[" * 100_000
ROWS = [
    *(
        pipeline(f"{path} holds {content[:12]}", text(path, content), f"{path} {message}")
        for path in (INDEX, CONFIG)
        for content, message in [
            ("", "is cut short or not JSON"),
            ("[]", "must hold a JSON object, got .*list"),
            ("42", "must hold a JSON object, got .*int"),
            ('"x"', "must hold a JSON object, got .*str"),
            ("null", "must hold a JSON object, got .*NoneType"),
            ('{"a": 1', "is cut short or not JSON"),
            (DEEP, "is cut short or not JSON"),
            ('{"a": NaN}', "is cut short or not JSON: NaN is no number of JSON"),
            (" " * 5_000_000, "must be at most 4194304 bytes, got 5000000"),
        ]
    ),
    pipeline(
        "index with an unknown key", setting(INDEX, guidance_scal=2), "unknown key 'guidance_scal', did you mean"
    ),
    pipeline(
        "index with a number as text", setting(INDEX, guidance_scale="2"), "guidance_scale must be float, got '2'"
    ),
    pipeline(
        "index with a guidance below 1", setting(INDEX, guidance_scale=0.5), f"{INDEX} is damaged: .*guidance_scale"
    ),
    pipeline("index with an unknown rule", setting(INDEX, guidance_rule="mine"), f"{INDEX} is damaged: .*rule"),
    pipeline(
        "index with half a step", setting(INDEX, num_refinement_steps=1.5), "num_refinement_steps must be int or"
    ),
    pipeline(
        "weights whole and in shards",
        shards_beside_whole_weights,
        r"has weights twice, transformer/model.safetensors and the shards of model.safetensors.index.json: take away",
    ),
    pipeline("index without a model", setting(INDEX, transformer=...), f"{INDEX} is incomplete: it lacks transformer"),
    pipeline(
        "index with a model of text", setting(INDEX, transformer="x"), "transformer must be a module and a class"
    ),
    pipeline(
        "index of another model", setting(INDEX, transformer=["transformers", "BertModel"]), "must be a TarFlowM"
    ),
    pipeline("index of no class", setting(INDEX, transformer=[None, None]), "transformer must be a TarFlowModel, got"),
    pipeline("index without a class", setting(INDEX, _class_name=[]), f"not a TarFlow pipeline: its {INDEX} names"),
    pipeline("index with a key twice", text(INDEX, '{"a": 1, "a": 2}'), "the key 'a' stands in it twice"),
    pipeline("config with an unknown key", setting(CONFIG, num_block=4), f"{CONFIG} is damaged: .*'num_blocks'"),
    pipeline(
        "config of another model", setting(CONFIG, model_type="bert"), f"{CONFIG} .*model_type must be 'tarflow'"
    ),
    pipeline("config of nothing", text(CONFIG, "{}"), f"{CONFIG} is incomplete: it lacks image_size"),
    pipeline("config without head_dim", setting(CONFIG, head_dim=..., hidden_size=64), "lacks head_dim"),
    pipeline("config with a number as text", setting(CONFIG, num_blocks="3"), f"{CONFIG} is damaged: .*num_blocks"),
    pipeline("config with true for a number", setting(CONFIG, num_blocks=True), f"{CONFIG} is damaged: .*num_blocks"),
    pipeline(
        "config with null for a number", setting(CONFIG, hidden_size=None), f"{CONFIG} is damaged: .*hidden_size"
    ),
    pipeline("config of a noise below 0", setting(CONFIG, noise_std=-1.0), f"{CONFIG} is damaged: .*noise_std"),
    pipeline("config with a class too few", setting(CONFIG, num_classes=3), f"{CONFIG} is damaged: .*id2label"),
    pipeline("config of a type that is none", setting(CONFIG, dtype=3), f"{CONFIG} is damaged: dtype must .* got 3"),
    pipeline("config of whole numbers", setting(CONFIG, dtype="int8"), f"{CONFIG} is damaged: dtype must .*'int8'"),
    pipeline("config of text for a switch", setting(CONFIG, output_hidden_states="x"), "output_hidden_states must be"),
    pipeline(
        "config of quantization by 3", setting(CONFIG, quantization_config=3), "quantization_config must .* got 3"
    ),
    pipeline(
        "config of no quantizer", setting(CONFIG, quantization_config={}), f"{CONFIG} is damaged: quantization_c"
    ),
    pipeline(
        "config of an unknown quantizer",
        setting(CONFIG, quantization_config={"quant_method": "mine"}),
        f"{CONFIG} is damaged: quantization_config must",
    ),
    pipeline(
        "config of names that are numbers", setting(CONFIG, id2label={"0": 3, "1": "a", "2": "b", "3": "c"}), "by text"
    ),
    pipeline(
        "config of ids in a list", setting(CONFIG, label2id=[1]), f"{CONFIG} is damaged: label2id must be an obj"
    ),
    pipeline(
        "config of truth for a side", setting(CONFIG, image_size=[True, 8]), f"{CONFIG} is damaged: .*image_size"
    ),
    pipeline("config of 2^60 channels", setting(CONFIG, num_channels=2**60), "num_channels must be at most 1048576"),
    pipeline("config of 2^60 classes", setting(CONFIG, num_classes=2**60), "num_classes must be at most 1048576"),
    pipeline(
        "config of a block too few", setting(CONFIG, num_blocks=2, layers_per_block=[1, 2]), "among them blocks.2"
    ),
    pipeline(
        "config of a layer too few", setting(CONFIG, layers_per_block=[1, 1, 1]), r"among them blocks\.1\.layers\.1"
    ),
    pipeline(
        "config of 10^6 blocks",
        setting(CONFIG, num_blocks=10**6, layers_per_block=1),
        "says num_blocks=1000000, and the weights have no blocks.3",
    ),
    pipeline(
        "config of 10^6 layers",
        setting(CONFIG, layers_per_block=10**6),
        "says layers_per_block=1000000, and the weights have no blocks.0.layers.1",
    ),
    pipeline("config of 10^7 blocks", setting(CONFIG, num_blocks=10**7), f"{CONFIG} is damaged: .*num_blocks"),
    pipeline(
        "config of another width", setting(CONFIG, hidden_size=32), "class_embedding.weight must be 4 x 32, got 4 x 16"
    ),
    pipeline("config of another size", setting(CONFIG, image_size=16), "position_embedding must be 64 x 16, got 16 x"),
    pipeline("config without classes", setting(CONFIG, num_classes=0, id2label={}), "has 3 tensors .*class_embedding"),
    pipeline(
        "config of sizes that overflow",
        setting(CONFIG, image_size=2**20, patch_size=2**20, num_channels=2**20, hidden_size=2**20),
        "no memory holds a model of its sizes",
    ),
    pipeline("weights missing", lambda folder: (folder / WEIGHTS).unlink(), f"has no weights: neither {WEIGHTS}"),
    pipeline("weights empty", lambda folder: (folder / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is cut short"),
    pipeline("weights of a header without end", header(lambda _: "{"), f"{WEIGHTS} is damaged, or not a safetensors"),
    pipeline("weights of a listed header", header(lambda _: "[1]"), f"{WEIGHTS} is damaged, or not a safetensors"),
    pipeline("weights of a deep header", header(lambda _: DEEP), f"{WEIGHTS} is damaged, or not a safetensors"),
    pipeline(
        "weights of an endless header",
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62)),
        f"{WEIGHTS} is cut short: it has 8 bytes, its header alone 4611686018427387912",
    ),
    pipeline(
        "weights of a long header", header(lambda _: "{}" + " " * 5_000_000), "its header must be at most 4194304"
    ),
    pipeline("weights with a tensor twice", header(twice), f"{WEIGHTS} is damaged.*stands in it twice"),
    pipeline("weights with tensors that overlap", header(overlapping), f"{WEIGHTS} is damaged"),
    pipeline("weights without offsets", entry(data_offsets=...), f"{WEIGHTS} is damaged"),
    pipeline("weights with offsets of text", entry(data_offsets=["0", "4"]), f"{WEIGHTS} is damaged"),
    pipeline("weights with offsets that fall", entry(data_offsets=[64, 0]), f"{WEIGHTS} is damaged"),
    pipeline("weights with offsets beyond", entry(data_offsets=[0, 2**62]), f"{WEIGHTS} is cut short"),
    pipeline("weights of an unknown type", entry(dtype="F31"), f"{WEIGHTS} is damaged"),
    pipeline("weights without a shape", entry(shape=...), f"{WEIGHTS} is damaged"),
    pipeline("weights of a shape that overflows", entry(shape=[2**40, 2**40]), f"{WEIGHTS} is damaged"),
    pipeline("weights with an entry of text", header(lambda entries: entries.update(x="y")), f"{WEIGHTS} is damaged"),
    pipeline(
        "weights with bytes behind",
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"more"),
        f"{WEIGHTS} is damaged",
    ),
    pipeline("weights with a NaN", numbers(float("nan")), "1 of 64 numbers of blocks.1.proj_in.weight are not finite"),
    pipeline("weights with an infinity", numbers(float("-inf")), "blocks.1.proj_in.weight are not finite"),
    pipeline("weights with a tensor more", one("blocks.9.extra", torch.ones(1)), "among them blocks.9.extra"),
    pipeline(
        "weights of integers",
        tensors(lambda state: state.update({key: value.long() for key, value in state.items()})),
        "must be one of F64, F32, F16, BF16, got I64",
    ),
    pipeline("weights of one number", one("blocks.1.proj_in.weight", torch.ones(1)), "must be 16 x 4, got 1"),
    pipeline("no such variant", nothing, "no weights of the variant 'fp8'", variant="fp8"),
    pipeline("an argument misspelt", nothing, "no argument 'guidance_scal', did you", ValueError, guidance_scal=2.0),
    pipeline(
        "a default out of range", nothing, "guidance_scale.* must be finite and at", ValueError, guidance_scale=0.5
    ),
    pipeline(
        "shards without places",
        shards(lambda index, _: index.pop("weight_map")),
        "index.json is damaged: weight_map must name the file of each tensor, got None",
    ),
    pipeline("shards without metadata", shards(lambda index, _: index.pop("metadata")), "metadata must be an object"),
    pipeline("shards placed by numbers", renamed_shard(3), "weight_map must name the file of each tensor"),
    pipeline(
        "shards above the folder", renamed_shard("../model-00001-of-00002.safetensors"), r"'\.\./model-.* is no name"
    ),
    pipeline("shards at an absolute path", renamed_shard("/etc/passwd"), "'/etc/passwd' is no name of a shard"),
    pipeline(
        "shards of other bytes",
        shards(lambda index, _: index["metadata"].update(total_size=1)),
        r"index.json is damaged: total_size must be the \d+ bytes of the tensors, got 1$",
    ),
    pipeline(
        "shards of bytes in words",
        shards(lambda index, _: index["metadata"].update(total_size="all")),
        "index.json is damaged: total_size must be a number of bytes, got 'all'",
    ),
    pipeline(
        "shards placed wrongly", shards(changed_places), "has blocks.0.*, which model.safetensors.index.json does"
    ),
    pipeline(
        "a shard missing",
        shards(lambda index, folder: (folder / min(index["weight_map"].values())).unlink()),
        "incomplete: it has no transformer/model-00001-of-",
    ),
    *(
        processor(name, content, f"preprocessor_config.json is {message}")
        for name, content, message in [
            ("no settings", "{}", "incomplete: it lacks image_size, num_channels"),
            ("no channels", '{"image_size": 8}', "incomplete: it lacks num_channels"),
            (
                "a setting misspelt",
                '{"image_size": 8, "num_channels": 1, "resise": "adm"}',
                ".*, did you mean 'resize'",
            ),
            (
                "another's setting",
                '{"image_size": 8, "num_channels": 1, "do_resize": true}',
                ".*unknown setting 'do_re",
            ),
        ]
    ),
    processor(
        "truth for a size", '{"image_size": true, "num_channels": 1}', "image_size must be .* got True", ValueError
    ),
    processor(
        "truth for channels", '{"image_size": 8, "num_channels": true}', "num_channels 1 .* got True", ValueError
    ),
    model("model with a NaN", numbers(float("nan")), "model.safetensors is damaged: 1 of 64 numbers"),
    model("model of another width", setting(CONFIG, hidden_size=32), "must be 4 x 32, got 4 x 16"),
    model("model with a tensor more", one("blocks.9.extra", torch.ones(1)), "among them blocks.9.extra"),
    model("model of listed settings", text(CONFIG, "[]"), "config.json must hold a JSON object"),
    model("model with a setting misspelt", nothing, "no argument 'num_block', did you", ValueError, num_block=4),
    model("model changed without leave", nothing, "class_embedding.weight must be 5 x 16", num_classes=5),
    model("model of pickled weights", nothing, "use_safetensors must be True", ValueError, use_safetensors=False),
    model(
        "model of fewer blocks by wish",
        nothing,
        "blocks.2.class_embedding.weight would be left out",
        ValueError,
        num_blocks=2,
        layers_per_block=[1, 2],
        ignore_mismatched_sizes=True,
    ),
    model("Auto model with a NaN", numbers(float("nan")), "1 of 64 numbers", load=AutoModel.from_pretrained),
    model(
        "Auto model with an unknown key", setting(CONFIG, num_block=4), "num_blocks", load=AutoModel.from_pretrained
    ),
    model(
        "Auto model of 10^6 layers",
        setting(CONFIG, layers_per_block=10**6),
        "no blocks.0.layers.1",
        load=AutoModel.from_pretrained,
    ),
]
