"""Recipes and command lines of `examples/train.py`."""

import re

from bad_inputs import Bad
from examples import train_inverse, train_vae
from tarflow_hf.training.recipes import parse_arguments


def recipe(name, text, message, *command_line, error=ValueError):
    """A row: the trainer is given a recipe of this text."""

    def call(folder):
        (folder / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        parse_arguments(["mine.yaml", *command_line], default_recipe="nowhere.yaml")

    return Bad(name, call, error, message)


def option(name, value, message):
    """A row: an otherwise sound recipe sets an option wrongly in its third line."""
    others = "data: x\n" + ("# no length\n" if name in ("epochs", "max_steps") else "max_steps: 10\n")
    return recipe(f"{name} {value[:20]}", f"{others}{name}: {value}\n", f"^mine.yaml, line 3: {message}")


def inverse(name, message, **options):
    """A row: the trainer of a learned inverse is given these options."""
    values = {"flow": "gone", "data": "examples/data/digits", **options}
    argv = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    return Bad(f"an inverse's {name}", lambda _: train_inverse.main(argv), ValueError, message)


def autoencoder(name, text, message, *command_line):
    """A row: the trainer of an autoencoder is given a recipe that ends in this line."""

    def call(folder):
        (folder / "mine.yaml").write_text(f"data: x\n{text}\n")
        train_vae.parse(["mine.yaml", *command_line])

    return Bad(f"an autoencoder's {name}", call, ValueError, message)


SOUND = "data: x\nmax_steps: 10\n"
ROWS = [
    Bad("no file", lambda _: parse_arguments([], default_recipe="nowhere.yaml"), FileNotFoundError, "nowhere.yaml"),
    recipe("nothing", "", "mine.yaml must hold a mapping of options, got NoneType"),
    recipe("a list", "- data: x\n", "mine.yaml must hold a mapping of options, got list"),
    recipe("a number", "42", "mine.yaml must hold a mapping of options, got int"),
    recipe("no data", "max_steps: 1\n", "^mine.yaml: data must name a data set"),
    recipe("not YAML", "data: x\nmax_steps: [1\n", "^mine.yaml, line [23]: not YAML"),
    recipe("a tab", "data: x\n\tmax_steps: 1\n", "^mine.yaml, line 2: not YAML"),
    recipe("code", "data: !!python/object/apply:os.system ['true']\n", "^mine.yaml, line 1: not YAML: could"),
    recipe("two documents", "data: x\n---\nmax_steps: 1\n", "^mine.yaml, line 2: not YAML"),
    recipe("bytes", b"data: \xff\xfe\n", "^mine.yaml: not YAML"),
    recipe("deep nesting", "data: " + "[" * 50_000, "^mine.yaml: not YAML"),
    recipe("an unknown alias", "data: *x\n", "^mine.yaml, line 1: not YAML: found undefined alias"),
    recipe("too large", "# " + "x" * 2**20 + "\n", "mine.yaml must be at most 1048576 bytes"),
    recipe("a key twice", SOUND + "max_steps: 20\n", "^mine.yaml, line 3: max_steps is given already in line 2"),
    recipe("a number as key", SOUND + "7: 8\n", "^mine.yaml, line 3: an option must be a name, got '7'"),
    recipe("a list as key", SOUND + "[a, b]: 8\n", "^mine.yaml, line 3: "),
    recipe(
        "a key misspelt",
        SOUND + "batchsize: 8\n",
        "^mine.yaml, line 3: unknown option 'batchsize', did you",
    ),
    recipe("a key unknown", SOUND + "xyzzy: 8\n", "^mine.yaml, line 3: unknown option 'xyzzy'$"),
    recipe("two lengths", SOUND + "epochs: 2\n", "^mine.yaml, line 2 and 3: give either epochs or max_steps"),
    recipe("on the command line", SOUND, "^batch_size must be int, got 'many'", "--batch_size", "many"),
    recipe("not YAML there", SOUND, "^--batch_size must be written as in a recipe", "--batch_size", "[1"),
    option("batch_size", "010", "not YAML: '010' would be a number to base 8 or 60"),
    option("max_steps", "1:30", "not YAML: '1:30' would be a number to base 8 or 60"),
    option("learning_rate", "1:30.5", "not YAML: '1:30.5' would be a number to base 8 or 60"),
    option("patch_size", "3", "image_size=64 must be a multiple of patch_size=3"),
    *(
        option("layers_per_block", depth, f"layers_per_block must be .* got {re.escape(depth)}")
        for depth in ("[]", "0")
    ),
    option("noise_range", "[0.3, 0.1]", r"noise_range must be two rising .* got \(0.3, 0.1\)"),
    option("noise_std", "-1", "noise_std must be finite and at least 0, got -1.0"),
    option("hidden_size", "10000000", "hidden_size must be at most 1048576, got 10000000"),
    option("num_workers", "1000000", "num_workers must be at least 0 and at most 1024"),
    option("output_dir", "''", "output_dir must name a folder"),
    recipe("base 8 there", SOUND, "^--batch_size must be written as in a recipe, got '010'", "--batch_size", "010"),
    option("seed", "2026-11-25", "seed must be int, got datetime.date"),
    option("train_split", "no", "train_split must be str, got False"),
    option("layers_per_block", "[[1, 2], 3]", r"layers_per_block must be int or .* got \[\[1, 2\], 3\]"),
    option("lora", "{rnak: 3}", "lora has no 'rnak'; it has rank, alpha, targets"),
    option("lora", "{rank: true}", "lora.rank must be int, got True"),
    option("class_names", "[1, 2]", "class_names must be str, got 1"),
    *(option(name, ".inf", f"{name} must be finite, got inf") for name in ("epochs", "learning_rate")),
    option("epochs", "1.0e+400", "epochs must be finite, got inf"),
    option("learning_rate", "-.inf", "learning_rate must be finite, got -inf"),
    option("learning_rate", "nan", "learning_rate must be finite, got 'nan'"),
    option("learning_rate", "yes", "learning_rate must be float, got True"),
    option("learning_rate", "0", "learning_rate must be above 0"),
    option("noise_std", ".nan", "noise_std must be finite, got nan"),
    option("noise_range", "[0.1, .inf]", "noise_range must be finite, got inf"),
    option("max_grad_norm", ".nan", "max_grad_norm must be finite, got nan"),
    option("guidance_scale", ".inf", "guidance_scale must be finite, got inf"),
    option("seed", "12345678901234567890123", "seed must be int, got 12345678901234567890123"),
    option("seed", "-1", "seed must be at least 0 and below"),
    option("seed", "1.5", "seed must be int, got 1.5"),
    option("seed", "null", "seed must be int, got None"),
    option("batch_size", "0", "batch_size must be at least 1, got 0"),
    *(
        option("batch_size", written, f"batch_size must be int, got {shown}")
        for written, shown in {"many": "'many'", "true": "True", "[8]": r"\[8\]", "2.5": "2.5"}.items()
    ),
    option("horizontal_flip", "1", "horizontal_flip must be bool, got 1"),
    option("precision", "half", "precision must be one of float32, bfloat16"),
    option("ema_decay", "1.0", "ema_decay must be in"),
    option("label_drop", "2", "label_drop must be in"),
    option("layers_per_block", "[1, x]", "layers_per_block must be int or "),
    option("report_to", "clearml", "report_to must be one of"),
    option("data_config", "{a: 1}", "data_config must be str or null, got {'a': 1}"),
    option("eval_data", "[https://me:secret@host/x]", r"eval_data must be str or null, got \['https://host/x'\]$"),
    inverse("image without weight", "image_weight must be at least 0, got -1.0", image_weight=-1),
    inverse("features below weight", "perceptual_weight must be at least 0, got -0.5", perceptual_weight=-0.5),
    inverse("network by name", "must be inception, .* or FILE.py:FUNCTION, got 'vgg'", perceptual="vgg"),
    inverse("own autoencoder", "vae must be left out: it is the one of the flow, got './vae'", vae="./vae"),
    inverse("stream", "streaming must be left out: images are stored", streaming="true", cache_images="false"),
    *(
        option("override", value, f"override must be NAME=VALUE, or a list of such, got {shown}")
        for value, shown in {"true": "True", "1.5": "1.5", "2026-01-01": "datetime.date"}.items()
    ),
    autoencoder("batch of none", "batch_size: 0", "^mine.yaml, line 2: batch_size must be at least 1, got 0"),
    autoencoder("batch of text", "batch_size: many", "^mine.yaml, line 2: batch_size must be int, got 'many'"),
    autoencoder(
        "misspelt option", "batchsize: 8", "^mine.yaml, line 2: unknown option 'batchsize', did you mean 'bat"
    ),
    autoencoder("unknown option", "xyzzy: 8", "^mine.yaml, line 2: unknown option 'xyzzy'$"),
    autoencoder("base 8", "batch_size: 010", "^mine.yaml, line 2: not YAML: '010' would be"),
    autoencoder("base 8 there", "", "^--batch_size must be written as in a recipe, got '010'", "--batch_size", "010"),
    autoencoder("broken list there", "", "^--image_size must be written as in a recipe", "--image_size", "[8"),
    autoencoder("text there", "", "^batch_size must be int, got 'many'", "--batch_size", "many"),
    autoencoder(
        "list of settings", "autoencoder_config: [1]", "line 2: autoencoder_config must be a mapping of names"
    ),
    autoencoder("settings by number", "autoencoder_config: {1: 2}", "line 2: autoencoder_config must be a mapping of"),
    *(
        autoencoder(
            f"settings {settings}",
            f"autoencoder_config: {settings}",
            f"^mine.yaml, line 2: autoencoder_config={re.escape(shown)}.* makes no AutoencoderTiny: {reason}",
        )
        for settings, shown, reason in [
            ("{latent_chanels: 4}", "{'latent_chanels': 4}", ".*unexpected keyword argument 'latent_chanels'"),
            ("{latent_channels: 0}", "{'latent_channels': 0}", ""),
            ("{latent_channels: -1}", "{'latent_channels': -1}", "Trying to create tensor with negative dimension"),
            ("{latent_channels: x}", "{'latent_channels': 'x'}", ""),
            ("{scaling_factor: 0}", "{'scaling_factor': 0}", "the vae's scaling must be finite and above 0"),
            ("{scaling_factor: x}", "{'scaling_factor': 'x'}", "the vae's scaling must be numbers"),
            ("{act_fn: mine}", "{'act_fn': 'mine'}", "activation function mine not found"),
        ]
    ),
    autoencoder(
        "channels twice", "autoencoder_config: {in_channels: 1}", "autoencoder_config must leave in_channels out"
    ),
    *(
        option(name, "' '", f"{name} must name something, or be null, got ' '")
        for name in ("init_from", "vae", "eval_data", "eval_split", "label_column", "hub_model_id")
    ),
]
