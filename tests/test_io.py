"""``save`` and ``load`` give back the same object, whole or not at all."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import tnmoe as tn
from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe.backends import get_backend

SHAPE = tn.MPOShape((2, 4), (3, 2), out_features=7)


def example(dtype: str, kind: str, library: str) -> tn.MPO | tn.SharedMPO:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((7, 6)) + 1j * rng.standard_normal((7, 6))
    array = to_library(matrix if "complex" in dtype else matrix.real, library)
    array = get_backend(array).astype(array, dtype)
    mpo = tn.decompose(array, SHAPE, max_bond=4)
    if kind == "MPO":
        return mpo
    shared_sites = {"SharedMPO": "center", "all owned": "none", "first shared": (0,)}
    if kind in shared_sites:
        return tn.SharedMPO.replicate(mpo, 3, shared_sites[kind], noise=0.1, rng=0)
    experts = 1 if kind == "base, one expert" else 3
    return tn.SharedMPO.from_base(mpo, experts, max_bond=2, rng=0)


KINDS = ("MPO", "SharedMPO", "all owned", "first shared", "base", "base, one expert")


def arrays_of(obj: tn.MPO | tn.SharedMPO | None) -> tuple:
    if obj is None:
        return ()
    return obj.cores + arrays_of(getattr(obj, "base", None))


CASES = [
    (library, dtype)
    for library in LIBRARIES
    for dtype in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
    if dtype != "bfloat16" or library == "torch"
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("library", "dtype"), CASES)
def test_round_trip_is_bit_for_bit(tmp_path, library, dtype, kind):
    obj = example(dtype, kind, library)
    tn.save(tmp_path / "x.safetensors", obj)
    back = tn.load(tmp_path / "x.safetensors")
    assert type(back) is type(obj)
    assert (back.shape, back.center_site) == (obj.shape, obj.center_site)
    if isinstance(obj, tn.SharedMPO):
        assert back.shared_sites == obj.shared_sites
        assert (back.base is None) == (obj.base is None)
        if obj.base is not None:
            assert (back.base.shape, back.base.center_site) == (SHAPE, obj.base.center_site)
    for old, new in zip(arrays_of(obj), arrays_of(back), strict=True):
        assert type(new) is type(old)
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(to_numpy(new), to_numpy(old))
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("saved_from", LIBRARIES)
def test_another_library_can_be_asked_for(tmp_path, saved_from, library):
    obj = example("float32", "base", saved_from)
    tn.save(tmp_path / "x", obj)
    back = tn.load(tmp_path / "x", library=library)
    assert get_backend(back.center).name == library
    for old, new in zip(arrays_of(obj), arrays_of(back), strict=True):
        np.testing.assert_array_equal(to_numpy(new), to_numpy(old))


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_infinities_and_zeros_with_signs_are_kept(tmp_path, dtype):
    core = torch.tensor([np.inf, -0.0, 0.0, -np.inf]).to(getattr(torch, dtype))
    core = torch.complex(core.real, core.real.flip(0)) if core.is_complex() else core
    tn.save(tmp_path / "x", tn.MPO([core.reshape(1, 2, 2, 1)]))
    back = tn.load(tmp_path / "x").cores[0].reshape(-1)
    assert torch.equal(back.view(torch.uint8), core.view(torch.uint8))


def test_cores_that_are_views_are_stored_as_they_read(tmp_path):
    mpo = example("float32", "MPO", "torch").T
    tn.save(tmp_path / "x", mpo)
    torch.testing.assert_close(tn.load(tmp_path / "x").to_matrix(), mpo.to_matrix())


def test_tensors_that_are_only_marked_as_conjugate_or_negative_are_stored_as_they_read(tmp_path):
    core = torch.randn(1, 2, 2, 1, dtype=torch.complex128)
    for marked in (core.conj(), core.conj().imag):
        assert marked.is_conj() or marked.is_neg()
        tn.save(tmp_path / "x", tn.MPO([marked]))
        assert torch.equal(tn.load(tmp_path / "x").cores[0], marked)
        np.testing.assert_array_equal(
            np.asarray(tn.MPO([marked])), marked.resolve_conj().resolve_neg()[0, :, :, 0]
        )


def test_the_same_operator_is_saved_as_the_same_bytes(tmp_path):
    mpo, contents = example("float32", "MPO", "numpy"), set()
    for number in range(20):
        tn.save(tmp_path / f"{number}", mpo)
        contents.add((tmp_path / f"{number}").read_bytes())
    assert len(contents) == 1


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    old = example("float32", "MPO", "numpy")
    tn.save(path, old)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tn.save(path, example("float64", "MPO", "numpy"))
    assert tn.load(path).dtype == old.dtype
    assert os.listdir(tmp_path) == ["x"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    whole = tmp_path / "whole"
    tn.save(whole, example("float32", "MPO", "numpy"))
    truncated = tmp_path / "truncated"
    truncated.write_bytes(whole.read_bytes()[:-10])
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"not a tensor in sight")
    foreign = tmp_path / "foreign"
    save_file({"w": np.ones(3)}, foreign)
    partial = tmp_path / "partial"
    description = {
        "format": 2,
        "kind": "MPO",
        "library": "numpy",
        "dtype": "float32",
        "out_dims": [2],
        "in_dims": [2],
        "out_features": 2,
        "in_features": 2,
        "center_site": 0,
        "base": None,
    }
    save_file({"cores.7": np.ones((1, 2, 2, 1))}, partial, {"tnmoe": json.dumps(description)})
    listed = tmp_path / "listed"
    save_file({"w": np.ones(3)}, listed, {"tnmoe": "[]"})
    for path, message in (
        (truncated, "is damaged or not a safetensors file"),
        (garbage, "is damaged or not a safetensors file"),
        (foreign, "foreign was not written by this version"),
        (partial, "does not hold what tnmoe.save writes"),
        (listed, "does not hold what tnmoe.save writes"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.load(path)
    for entries, message in (
        ({"dtype": "foo"}, "the dtype in .*described must be one of .*float32.* got 'foo'"),
        ({"dtype": "complex64"}, r"expected real and imaginary parts, got shape \(1, 2, 2, 1\)"),
        (
            {"kind": "Whatever"},
            "the kind in .*described must be one of MPO, SharedMPO, got 'Whatever'",
        ),
        (
            {"center_site": 0.0},
            "tnmoe.save writes: center_site must be an integer from 0 to 0, got 0.0",
        ),
        ({"out_dims": [3]}, r"tnmoe.save writes: the cores have \(out, in\) legs .* do not fit"),
    ):
        metadata = {"tnmoe": json.dumps(description | {"out_features": None} | entries)}
        described = tmp_path / "described"
        save_file({"cores.0": np.ones((1, 2, 2, 1), "float32")}, described, metadata)
        with pytest.raises(tn.InputError, match=message):
            tn.load(described)
    with pytest.raises(FileNotFoundError):
        tn.load(tmp_path / "missing")


def damaged(told=lambda told: None, arrays=lambda arrays: None):
    """Changes of the description and of the arrays of a saved mixture with a base."""
    return told, arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged(told=lambda told: told.pop("base")), "KeyError\\('base'\\)"),
        (damaged(told=lambda told: told.update(base=None)), r"more arrays, \['base.0', 'base.1'\]"),
        (damaged(told=lambda told: told.update(base=[1])), "TypeError"),
        (damaged(told=lambda told: told["base"].pop("in_dims")), "KeyError"),
        (damaged(told=lambda told: told["base"].update(in_dims=[3, 3])), "which do not fit"),
        (
            damaged(told=lambda told: told["base"].update(out_features=6)),
            "base must be a .7, 6. matrix",
        ),
        (
            damaged(told=lambda told: told["base"].update(center_site=2)),
            "center_site must be an integer",
        ),
        (
            damaged(told=lambda told: told.update(center_site=None)),
            "center_site must be an integer",
        ),
        (damaged(told=lambda told: told.update(kind="MPO")), "got .*(3, 1, 7, 1, 2)"),
        (damaged(arrays=lambda arrays: arrays.pop("base.0")), "do not fit"),
        (damaged(arrays=lambda arrays: arrays.pop("base.1")), "do not fit"),
        (damaged(arrays=lambda arrays: arrays.pop("cores.1")), "do not fit"),
        (damaged(arrays=lambda arrays: arrays.pop("cores.0")), "center_site must be"),
        (
            damaged(arrays=lambda arrays: arrays.update(center=np.ones(1, "float32"))),
            r"more arrays, \['center'\]",
        ),
        (
            damaged(arrays=lambda arrays: arrays.update({"cores.1": arrays["cores.1"][:2]})),
            r"needs a core per expert, got \[3, 2\] experts",
        ),
        (
            damaged(
                arrays=lambda arrays: arrays.update(
                    {f"cores.{k}": arrays[f"cores.{k}"][0] for k in (0, 1)}
                ),
            ),
            "experts must own a core",
        ),
    ],
)
def test_a_mixture_that_lost_or_changed_a_part_is_refused(tmp_path, change, message):
    tn.save(tmp_path / "x", example("float32", "base", "numpy"))
    with safe_open(tmp_path / "x", framework="np") as file:
        told = json.loads(file.metadata()["tnmoe"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change_description, change_arrays = change
    change_description(told)
    change_arrays(arrays)
    save_file(arrays, tmp_path / "x", {"tnmoe": json.dumps(told)})
    with pytest.raises(tn.InputError, match=rf"does not hold what tnmoe\.save writes.*{message}"):
        tn.load(tmp_path / "x")


def test_numbers_of_another_kind_than_the_file_says_are_refused(tmp_path):
    """A file stores the bits of bfloat16; plain numbers read as bits would change."""
    tn.save(tmp_path / "x", example("bfloat16", "MPO", "torch"))
    with safe_open(tmp_path / "x", framework="np") as file:
        metadata = file.metadata()
        numbers = {name: file.get_tensor(name).astype("int32") for name in file.keys()}  # noqa: SIM118
    save_file(numbers, tmp_path / "x", metadata)
    with pytest.raises(tn.InputError, match=r"does not hold what tnmoe\.save writes"):
        tn.load(tmp_path / "x")


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="expected an MPO or a SharedMPO, got ndarray"):
        tn.save(tmp_path / "x", np.ones(3))
    tn.save(tmp_path / "x", example("bfloat16", "MPO", "torch"))
    with pytest.raises(tn.InputError, match="bfloat16, which numpy lacks"):
        tn.load(tmp_path / "x", library="numpy")
    with pytest.raises(tn.InputError, match=r"one of .*numpy.*, torch.*, got 'unheard'"):
        tn.load(tmp_path / "x", library="unheard")


def test_a_saved_file_may_be_read_by_whom_other_files_may(tmp_path):
    tn.save(tmp_path / "x", example("float32", "MPO", "numpy"))
    (tmp_path / "other").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_is_no_ordinary_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(tn.InputError, match="is not a regular file"):
            tn.load(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"out_dims": [2] * 20_000, "in_dims": [2] * 20_000}, r"which do not fit \[\[2, 2, .*…"),
        ({"out_dims": [10**4000] * 2000, "in_dims": [1] * 2000}, r"which do not fit \[\[10000.*…"),
        ({"out_dims": [2] * 20_000 + [0], "in_dims": [2] * 20_001}, "which do not fit"),
        ({"out_features": 10**4000}, "out_features=10000.*… does not fit"),
    ],
)
def test_a_description_of_another_operator_is_refused_without_computing_with_it(
    entries, message, tmp_path
):
    mpo = example("float32", "MPO", "numpy")
    tn.save(tmp_path / "x", mpo)
    with safe_open(tmp_path / "x", framework="np") as file:
        told = json.loads(file.metadata()["tnmoe"])
        cores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(cores, tmp_path / "x", {"tnmoe": json.dumps(told | entries)})
    with pytest.raises(tn.InputError, match=message) as caught:
        tn.load(tmp_path / "x")
    assert len(str(caught.value)) < 1000


def test_a_folder_is_no_file_of_an_operator(tmp_path):
    with pytest.raises(tn.InputError, match=r"is a folder: .* tnmoe.hf.from_pretrained"):
        tn.load(tmp_path)
