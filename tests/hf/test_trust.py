"""No way of reading a folder runs its code, reads pickles, or follows links out of it."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tnmoe as tn
from tests.hf.composites import PARTS
from tests.hf.families import make, outputs, relative
from tnmoe import hf
from tnmoe.demo.models import load_dense, load_tokenizer

CONFIG = hf.MPOEConfig(num_experts=3, sites=3)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make folders of dense and converted models, by kind."""
    made = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = make("llama").eval()
    model.save_pretrained(made / "dense")
    hf.upcycle(model, CONFIG).save_pretrained(made / "converted")
    whole = next(make_whole for make_whole, *_ in PARTS if "llava" in make_whole.__name__)()
    whole.save_pretrained(made / "dense composite")
    hf.upcycle(whole, CONFIG).save_pretrained(made / "converted composite")
    return made


def inspected(folder, **options):
    return hf.inspect_checkpoint(folder, CONFIG, **options)


# By way in: which kind of folder it reads, and how.
WAYS = {
    "from_pretrained": ("converted", hf.from_pretrained),
    "export": ("converted", lambda folder: hf.prepare_export(folder, to="dense")),
    "upcycle": ("dense", lambda folder: hf.prepare_upcycle(folder, CONFIG)),
    "inspect": ("dense", inspected),
    "inspect sizes": ("dense", lambda folder: inspected(folder, weights=False)),
    "demo": ("dense", lambda folder: load_dense(folder, ("no", "yes"), seed=0)),
    "demo's words": ("dense", load_tokenizer),
}
OF_CHECKPOINTS = ("from_pretrained", "export", "upcycle", "inspect")


@pytest.fixture
def copy_of(folders, tmp_path):
    """Return a function that copies a folder, for a test to change."""
    return lambda kind: shutil.copytree(folders / kind, tmp_path / "model")


def rewrite(folder, change):
    path = folder / "config.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


def named_code(folder):
    """Return entries of a configuration that name a module in the folder."""
    classes = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForSequenceClassification",
        "AutoModelForCausalLM",
    )
    return {
        "auto_map": dict.fromkeys(classes, "evil.Model"),
        "_name_or_path": str(folder),
        "name_or_path": str(folder),
    }  # fmt: skip


def of_unknown_type(entries, code):
    entries.update(code, model_type="magic")


def of_a_type_without_a_model(entries, code):
    """transformers has a configuration of this type, but no model of it alone."""
    for key in ("architectures", "id2label"):
        entries.pop(key, None)
    entries.update(code, model_type="clipseg_text_model")


def of_a_part(entries, code):
    part = entries["text_config"]
    for key in ("architectures", "id2label", "tnmoe"):
        part.pop(key, None)
    part.update(code, model_type="clipseg_text_model")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", [of_unknown_type, of_a_type_without_a_model, of_a_part])
def test_code_that_a_folder_names_does_not_run_whoever_says_yes(
    way, place, copy_of, tmp_path, monkeypatch
):
    kind, read = WAYS[way]
    folder = copy_of(f"{kind} composite" if place is of_a_part else kind)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "cache")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("y") or "y")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Magic", "auto_map": {"AutoTokenizer": ["evil.Model", null]}}'
    )
    rewrite(folder, lambda entries: place(entries, named_code(folder)))
    with suppress(ValueError, RuntimeError):
        read(folder)
    assert not (tmp_path / "ran").exists()
    assert not asked


@pytest.mark.parametrize("way", ["from_pretrained", "upcycle", "inspect sizes", "demo"])
@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:forward"},
        {"attn_implementation": {"": "someone/kernel"}},
        {"experts_implementation": "sonicmoe"},
    ],
)
def test_kernels_of_the_hub_are_none_of_a_folders_business(way, entry, copy_of, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.get_kernel", lambda *_, **__: asked.append("kernel")
    )
    monkeypatch.setattr("transformers.integrations.hub_kernels.is_kernels_available", lambda: True)
    kind, read = WAYS[way]
    folder = copy_of(kind)
    rewrite(folder, lambda entries: entries.update(entry))
    read(folder)
    assert not asked


def test_a_callers_own_choice_of_attention_stands(copy_of):
    folder = copy_of("converted")
    for named in ("eager", "sdpa", None):
        rewrite(folder, lambda entries, named=named: entries.update(attn_implementation=named))
        assert hf.from_pretrained(folder).config._attn_implementation == (named or "sdpa")
    given = hf.from_pretrained(folder, attn_implementation="eager")
    assert given.config._attn_implementation == "eager"


def test_code_runs_where_the_caller_trusts_it(copy_of, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    folder = copy_of("converted")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        "def generate(model, *args, **kwargs):\n    return 'trusted'\n"
    )
    assert hf.from_pretrained(folder, trust_remote_code=True).generate() == "trusted"
    with pytest.raises(ValueError, match=r"inputs|bos_token_id"):
        hf.from_pretrained(folder).generate(input_ids=None, bos_token_id=None)


def moved_out(folder, name):
    """Move a file out of the folder, and return its new path."""
    target = folder.parent / "elsewhere"
    target.mkdir(exist_ok=True)
    return (folder / name).rename(target / name)


def with_index(folder, file):
    names = load_file(folder / SINGLE) if (folder / SINGLE).exists() else ["x"]
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)})
    )


def linked(name):
    return lambda folder: (folder / name).symlink_to(moved_out(folder, name))


def indexed_above(folder):
    with_index(folder, f"../elsewhere/{SINGLE}")
    moved_out(folder, SINGLE)


def indexed_absolutely(folder):
    with_index(folder, str(folder.parent / "elsewhere" / SINGLE))
    moved_out(folder, SINGLE)


def indexed_in_a_linked_folder(folder):
    with_index(folder, f"sub/{SINGLE}")
    (folder / "sub").symlink_to(moved_out(folder, SINGLE).parent)


def linked_index(folder):
    with_index(folder, "part.safetensors")
    (folder / SINGLE).rename(folder / "part.safetensors")
    linked(INDEX)(folder)


def named_and_linked(folder):
    (folder / SINGLE).rename(folder / "named.safetensors")
    linked("named.safetensors")(folder)
    rewrite(folder, lambda entries: entries.update(transformers_weights="named.safetensors"))


def linked_blob(folder):
    """Link to a folder of blobs as the Hub's cache does, outside of such a cache."""
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    (folder / SINGLE).rename(blobs / SINGLE)
    (folder / SINGLE).symlink_to(blobs / SINGLE)


LEADING_OUT = [
    linked("config.json"), linked(SINGLE), indexed_above, indexed_absolutely,
    indexed_in_a_linked_folder, linked_index, named_and_linked, linked_blob,
]  # fmt: skip


@pytest.mark.parametrize("way", OF_CHECKPOINTS)
@pytest.mark.parametrize("lead_out", LEADING_OUT)
def test_what_leads_out_of_a_folder_is_refused(way, lead_out, copy_of):
    kind, read = WAYS[way]
    folder = copy_of(kind)
    lead_out(folder)
    with pytest.raises(tn.InputError, match=r"leads out of the folder: refused; .*cp -rL"):
        read(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "adapter_config.json"])
def test_whatever_transformers_may_read_lies_in_the_folder(name, copy_of):
    folder = copy_of("converted")
    (folder / name).write_text("{}")
    linked(name)(folder)
    with pytest.raises(tn.InputError, match=f"{name} leads out of the folder"):
        hf.from_pretrained(folder)
    (folder / name).unlink()
    (folder / "README.md").symlink_to("/etc/hostname")  # which nobody reads
    (folder / "logs").symlink_to("/tmp")
    hf.from_pretrained(folder)


@pytest.mark.parametrize("way", ["demo", "demo's words"])
def test_the_demo_follows_no_link_out_of_its_model(way, copy_of):
    folder = copy_of("dense")
    (folder / "tokenizer.json").write_text("{}")
    linked("tokenizer.json")(folder)
    with pytest.raises(tn.InputError, match=r"tokenizer.json leads out of the folder"):
        WAYS[way][1](folder)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"subfolder": "inner"}])
@pytest.mark.parametrize("safetensors", [True, False])
def test_variants_and_subfolders_lie_in_the_folder(options, safetensors, copy_of):
    folder = copy_of("converted")
    name = SINGLE if safetensors else "pytorch_model.bin"
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    if "variant" in options:
        base, _, kind = name.rpartition(".")
        linked_name = f"{base}.fp16.{kind}"
        (folder / name).rename(folder / linked_name)
        linked(linked_name)(folder)
    else:
        shutil.copytree(folder, folder.parent / "other")
        (folder / "inner").symlink_to(folder.parent / "other")
    with pytest.raises(tn.InputError, match="leads out of the folder"):
        hf.from_pretrained(folder, use_safetensors=safetensors, **options)


def test_a_subfolder_above_the_folder_is_refused(copy_of):
    folder = copy_of("converted")
    shutil.copytree(folder, folder.parent / "other")
    with pytest.raises(tn.InputError, match="leads out of the folder"):
        hf.from_pretrained(folder, subfolder="../other")


def test_an_index_of_pickles_lists_files_of_the_folder(copy_of):
    folder = copy_of("converted")
    torch.save(load_file(folder / SINGLE), folder.parent / "part.bin")
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "../part.bin"}})
    )
    with pytest.raises(tn.InputError, match=r"part.bin leads out of the folder"):
        hf.from_pretrained(folder, use_safetensors=False)


def test_an_index_of_files_that_are_gone_does_not_matter_beside_the_weights(copy_of):
    folder = copy_of("converted")
    model = hf.from_pretrained(folder)
    # transformers leaves the index when it saves in one file what it saved in several.
    model.save_pretrained(folder, max_shard_size="10KB")
    model.save_pretrained(folder)
    # Whoever copies no pickles copies their index, which is JSON.
    shutil.copy(folder / INDEX, folder / "pytorch_model.bin.index.json")
    assert {each.name for each in folder.glob("*.safetensors")} == {SINGLE}
    loaded = hf.from_pretrained(folder)
    assert relative(outputs(loaded.eval(), "llama"), outputs(model.eval(), "llama")) == 0


def in_the_hubs_cache(folder):
    """Lay files out as the Hub's cache does, and return the snapshot's folder."""
    repository = folder.parent / "models--someone--something"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = path.rename(repository / "blobs" / f"hash-of-{path.name}-{path.parent.name}")
            link.symlink_to(blob)
    return snapshot


@pytest.mark.parametrize("way", OF_CHECKPOINTS)
@pytest.mark.parametrize("linked_to", [False, True])
def test_the_cache_of_the_hub_is_read(way, linked_to, copy_of):
    kind, read = WAYS[way]
    folder = in_the_hubs_cache(copy_of(kind))
    if linked_to:
        (folder.parents[2] / "mine").symlink_to(folder)
        folder = folder.parents[2] / "mine"
    read(folder)


def test_a_subfolder_in_the_cache_of_the_hub_is_loaded(copy_of, folders):
    folder = copy_of("converted")
    shutil.copytree(folders / "converted", folder / "inner")
    hf.from_pretrained(in_the_hubs_cache(folder), subfolder="inner")


@pytest.mark.parametrize("way", OF_CHECKPOINTS)
def test_links_within_a_folder_are_followed(way, copy_of):
    kind, read = WAYS[way]
    folder = copy_of(kind)
    (folder / "stored").mkdir()
    for name in ("config.json", SINGLE):
        (folder / name).rename(folder / "stored" / name)
        (folder / name).symlink_to(f"stored/{name}")
    read(folder)


def test_a_folder_of_links_is_read_once_it_is_copied_with_what_they_lead_to(copy_of):
    """Caches of data under version control are laid out so."""
    folder = copy_of("converted")
    links = folder.parent / "links"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    with pytest.raises(tn.InputError, match="leads out of the folder: refused"):
        hf.from_pretrained(links)
    copied = shutil.copytree(links, folder.parent / "copied", symlinks=False)
    assert relative(
        outputs(hf.from_pretrained(copied).eval(), "llama"),
        outputs(hf.from_pretrained(folder).eval(), "llama"),
    ) < 1e-6  # fmt: skip


def only_a_pickle(folder):
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def an_index_of_a_pickle(folder):
    with_index(folder, "pytorch_model.bin")
    only_a_pickle(folder)


def a_named_pickle(folder):
    only_a_pickle(folder)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    rewrite(folder, lambda entries: entries.update(transformers_weights="adapter_model.bin"))


@pytest.mark.parametrize("way", OF_CHECKPOINTS)
@pytest.mark.parametrize("spoil", [only_a_pickle, an_index_of_a_pickle, a_named_pickle])
def test_pickles_are_not_read(way, spoil, copy_of, monkeypatch):
    kind, read = WAYS[way]
    folder = copy_of(kind)
    spoil(folder)
    opened = []
    monkeypatch.setattr(torch, "load", lambda *_, **__: opened.append("a pickle"))
    with pytest.raises(tn.InputError, match=r"pytorch_model\.bin|adapter_model\.bin"):
        read(folder)
    if way == "from_pretrained":
        with pytest.raises(tn.InputError, match=r"pytorch_model\.bin|adapter_model\.bin"):
            read(folder, use_safetensors=None)
    assert not opened


def test_pickles_are_read_where_the_caller_asks_for_them(copy_of):
    folder = copy_of("converted")
    expected = outputs(hf.from_pretrained(folder).eval(), "llama")
    only_a_pickle(folder)
    loaded = hf.from_pretrained(folder, use_safetensors=False).eval()
    assert relative(outputs(loaded, "llama"), expected) < 1e-6


@pytest.mark.parametrize("named", ["single beside index", "by config.json", "variant"])
def test_every_way_in_takes_the_same_of_several_files(named, copy_of, tmp_path):
    folder = copy_of("converted")
    tensors, options = load_file(folder / SINGLE), {}
    others = {name: torch.zeros_like(each) for name, each in tensors.items()}
    save_file(others, folder / "other.safetensors", metadata={"format": "pt"})
    if named == "single beside index":
        with_index(folder, "other.safetensors")
    else:
        (folder / SINGLE).rename(folder / "model.fp16.safetensors")
        (folder / "other.safetensors").rename(folder / SINGLE)
    if named == "by config.json":
        rewrite(folder, lambda e: e.update(transformers_weights="model.fp16.safetensors"))
    elif named == "variant":
        options = {"variant": "fp16"}
    loaded = hf.from_pretrained(folder, **options)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    if named != "variant":
        hf.prepare_export(folder, to="moe").run(tmp_path / "moe")
        moe = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
        assert relative(outputs(moe, "llama"), outputs(loaded.eval(), "llama")) < 1e-5


@pytest.mark.parametrize("way", OF_CHECKPOINTS[1:])
def test_adapters_beside_a_model_are_not_left_out_without_a_word(way, copy_of):
    kind, read = WAYS[way]
    folder = copy_of(kind)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(tn.InputError, match="holds adapters of PEFT beside the model"):
        read(folder)


def test_a_part_of_a_distributed_checkpoint_beside_a_whole_one_is_refused(copy_of):
    """transformers would load it, and the command line would refuse it."""
    folder = copy_of("converted")
    shutil.copy(folder / SINGLE, folder / "shard-00001-model-00001-of-00001.safetensors")
    for way in ("from_pretrained", "export"):
        with pytest.raises(
            tn.InputError, match=r"shard-00001.* holds the share of one process of several"
        ):
            WAYS[way][1](folder)
