"""Loading from and pushing to a Hub over real sockets; each client is a process of its own (see `hub/`)."""

import pytest
from huggingface_hub import ModelCard

from hub.loopback import LoopbackHub

pytestmark = pytest.mark.xdist_group("hub")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("home")) as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub):
    return hub.run("push")


@pytest.fixture(scope="module")
def loaded(hub, pushed):
    return hub.run("load")


@pytest.fixture(scope="module")
def requests_before_offline(hub, loaded):
    return len(hub.log())


@pytest.fixture(scope="module")
def offline(hub, requests_before_offline):
    return hub.run("offline", HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def through_shims(hub, pushed):
    return hub.run("shims")


def test_push_is_one_commit_with_everything(pushed):
    once = pushed["once"]
    assert once["titles"] == ["Upload TarFlowPipeline", "initial commit"]
    assert once["files"] == [
        ".gitattributes",
        "README.md",
        "model_index.json",
        "modeling_tarflow.py",
        "pipeline.py",
        "transformer/config.json",
        "transformer/model.safetensors",
        "transformer/modeling_tarflow.py",
        "transformer/preprocessor_config.json",
    ]
    assert once["tag"]
    assert once["second push without a change"]
    assert not once["private"]


def test_pushed_card_names_its_repository(pushed):
    card = ModelCard(pushed["once"]["card"])
    assert 'from_pretrained("alice/flow")' in card.text
    assert "\n# flow\n" in card.text
    assert card.data.library_name == "diffusers"


def test_variants_stand_beside_each_other_and_shards_replace_the_whole(pushed):
    variants = pushed["variants"]
    assert variants["variants"] == ["transformer/model.bf16.safetensors", "transformer/model.safetensors"]
    assert variants["whole"] == ["transformer/model.safetensors"]
    assert "transformer/model.safetensors" not in variants["sharded"]
    assert "transformer/model.safetensors.index.json" in variants["sharded"]
    assert len(variants["sharded"]) > 2


def test_push_private_to_a_branch_and_as_pull_request(pushed):
    elsewhere = pushed["elsewhere"]
    assert elsewhere["secret is private"]
    assert elsewhere["branch"] == "Guide by default"
    assert elsewhere["pull request"] == "refs/pr/1"
    assert elsewhere["main unchanged"]
    assert elsewhere["refused"] == [
        "ValueError",
        "create_pr=True opens a pull request against main: revision must be None, got 'dev'",
    ]
    assert elsewhere["not mine"][0] == "HfHubHTTPError"
    assert "bob/flow" in elsewhere["not mine"][1]


def test_push_keeps_what_a_person_wrote_on_the_card(pushed):
    edits = pushed["edits"]
    assert edits["text kept"]
    assert edits["text kept by push_folder"]
    assert edits["license"] == "mit"
    assert edits["tags"][0] == "mine"
    assert "normalizing-flow" in edits["tags"]


def test_push_folder_takes_pictures_but_no_subfolders(pushed):
    assert "samples.png" in pushed["edits"]["folder"]
    assert not any(name.startswith("checkpoints") for name in pushed["edits"]["folder"])
    assert 'from_pretrained("alice/folder")' in pushed["edits"]["folder's card"]


def test_push_folder_takes_nothing_that_it_was_not_asked_to(pushed):
    assert set(pushed["edits"]["folder"]) - set(pushed["once"]["files"]) == {"samples.png"}


def test_folders_that_are_not_whole_are_refused_before_a_repository_is_made(pushed):
    nothing = pushed["nothing"]
    assert not nothing["made"]
    assert {kind for kind, _ in nothing["refused"].values()} == {"OSError"}
    messages = {name: text for name, (_, text) in nothing["refused"].items()}
    assert "has no weights" in messages["transformer/model.safetensors"]
    assert "is incomplete: it has no transformer/config.json" in messages["transformer/config.json"]
    assert "is incomplete: it has no README.md" in messages["README.md"]
    assert "README.md is a link that leaves the folder" in messages["link"]


def test_model_alone_is_pushed(pushed):
    assert {"config.json", "model.safetensors"} <= set(pushed["model"]["files"])


def test_conversion_command_pushes(pushed):
    assert pushed["converted"] == {"classes": 5}


def test_push_in_the_background_while_training_goes_on(pushed):
    background = pushed["background"]
    assert background["nothing"] is None
    assert background["begun"] == [True, True]
    assert background["titles"] == ["Step 2", "Step 1", "initial commit"]
    assert background["last"]
    assert background["after a failure"] == [None, True]


def test_loaded_in_another_process_it_samples_the_same_bits(pushed, loaded):
    versions = loaded["versions"]
    assert {versions[name] for name in ("samples", "tag", "commit", "sharded", "given model")} == {pushed["samples"]}
    assert versions["mode"] is False
    assert versions["guidance"] == [1.0, 2.0, 2.0]


def test_variant_dtype_and_device_map(loaded):
    assert loaded["weights"] == {
        "plain": "torch.float32",
        "variant": "torch.bfloat16",
        "dtype": "torch.float16",
        "variant and dtype": "torch.float32",
        "device map": "cpu",
    }


def test_cache_dir_and_local_files_only(loaded):
    places = loaded["places"]
    assert places["empty cache"][0] == "OSError"
    assert "in the cache" in places["empty cache"][1]
    assert "model.bf16.safetensors" in places["other variant"][1]
    assert places["downloaded"] == ["config.json", "model.safetensors"]


def test_auto_classes_and_model_class_load_from_the_repository(loaded):
    models = loaded["models"]
    assert set(models["types"]) == {"TarFlowModel"}
    assert models["dtypes"] == ["torch.float32", "torch.bfloat16", "torch.float32", "torch.float32"]
    assert models["equal"] == [True, False, True, True]
    assert models["config"] == ["TarFlowConfig", True]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "no Hub repository 'alice/nothing', or it is private and the token that was sent has no access"),
        ("missing, anonymous", "no Hub repository 'alice/nothing', or it is private and no token was sent"),
        ("private, anonymous", "no Hub repository 'alice/secret', or it is private and no token was sent"),
        ("private, stranger", "'alice/secret', or it is private and the token that was sent has no access to it"),
        ("wrong token", "Invalid credentials"),
        ("no such branch", "'alice/flow' has no branch, tag or commit 'nowhere'"),
        ("no such variant", "alice/flow has no weights of the variant 'fp8'"),
        ("no such folder", "'runs/digits/2025/pipeline' is neither a folder nor the name of a Hub repository"),
        ("not a pipeline", "'alice/empty' is not a TarFlow pipeline: it has no model_index.json"),
        ("another pipeline", "alice/other is not a TarFlow pipeline: its model_index.json names DDPMPipeline"),
        ("index cut short", "alice/index: model_index.json is cut short or not JSON"),
        (
            "weights cut short",
            "alice/short: transformer/model.safetensors is cut short: it has 144708 of 144808 bytes",
        ),
        ("header cut short", "alice/header: transformer/model.safetensors is cut short: it has 50 bytes"),
        ("shard missing", "alice/shard is incomplete: it has no transformer/model-00001-of-"),
    ],
)
def test_what_cannot_be_loaded_says_why(loaded, case, message):
    kind, text = loaded["refused"][case]
    assert kind == "OSError"
    assert message in text


def test_the_owner_loads_a_private_repository(loaded):
    assert loaded["refused"]["private, owner"] == ["", ""]


def test_weights_of_another_kind_of_pipeline_are_not_downloaded(hub, loaded):
    assert not [line for line in hub.log() if "alice/other" in line and "unet" in line and "resolve" in line]


def test_offline_it_loads_from_the_cache_without_a_request(hub, pushed, offline, requests_before_offline):
    assert offline["samples"] == offline["tag"] == pushed["samples"]
    assert offline["variant"] == "torch.bfloat16"
    assert offline["model"] == "TarFlowModel"
    assert "'alice/folder' is not, or not completely, in the cache" in offline["never seen"][1]
    assert len(hub.log()) == requests_before_offline


def test_diffusers_and_transformers_find_the_package_through_the_shims(through_shims):
    assert through_shims["with the package"] == {
        "pipeline": ["tarflow_hf.pipeline_tarflow", "TarFlowPipeline"],
        "variant": ["tarflow_hf.pipeline_tarflow", "TarFlowPipeline"],
        "model": ["tarflow_hf.modeling_tarflow", "TarFlowModel"],
        "config": ["tarflow_hf.configuration_tarflow", "TarFlowConfig"],
    }


def test_whoever_lacks_the_package_is_told_to_install_it(through_shims):
    answer = ["ModuleNotFoundError", "this model needs the tarflow_hf package: pip install tarflow_hf"]
    assert list(through_shims["without the package"].values()) == [answer] * 4
