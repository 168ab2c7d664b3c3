"""save and load: the same object back, whole or not at all."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import tnmoe as tn

SHAPE = tn.MPOShape((2, 4), (3, 2), out_features=7)


def example(dtype: str, kind: str, library: str) -> tn.MPO | tn.SharedMPO:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((7, 6)) + 1j * rng.standard_normal((7, 6))
    if library == "torch":
        tensor = torch.from_numpy(matrix)
        array = (tensor if "complex" in dtype else tensor.real).to(getattr(torch, dtype))
    else:
        array = (matrix if "complex" in dtype else matrix.real).astype(dtype)
    mpo = tn.decompose(array, SHAPE, max_bond=4)
    return mpo if kind == "MPO" else tn.SharedMPO.replicate(mpo, 3, noise=0.1, rng=0)


def arrays_of(obj: tn.MPO | tn.SharedMPO) -> tuple:
    return obj.cores if isinstance(obj, tn.MPO) else (obj.center_core, *obj.aux)


CASES = [
    (library, dtype)
    for library in ("numpy", "torch")
    for dtype in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
    if (library, dtype) != ("numpy", "bfloat16")
]


@pytest.mark.parametrize("kind", ["MPO", "SharedMPO"])
@pytest.mark.parametrize(("library", "dtype"), CASES)
def test_round_trip_is_bit_for_bit(tmp_path, library, dtype, kind):
    obj = example(dtype, kind, library)
    tn.save(tmp_path / "x.safetensors", obj)
    back = tn.load(tmp_path / "x.safetensors")
    assert type(back) is type(obj)
    assert (back.shape, back.center) == (obj.shape, obj.center)
    for old, new in zip(arrays_of(obj), arrays_of(back), strict=True):
        assert type(new) is type(old)
        assert new.dtype == old.dtype
        assert (new == old).all()
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_another_library_can_be_asked_for(tmp_path):
    obj = example("float32", "SharedMPO", "numpy")
    tn.save(tmp_path / "x", obj)
    back = tn.load(tmp_path / "x", library="torch")
    torch.testing.assert_close(back.to_matrices(), torch.from_numpy(obj.to_matrices()))


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
        "kind": "MPO",
        "library": "numpy",
        "dtype": "float32",
        "out_dims": [2],
        "in_dims": [2],
        "out_features": 2,
        "in_features": 2,
        "center": 0,
    }
    metadata = {"tnmoe_format": "1", "tnmoe": json.dumps(description)}
    save_file({"cores.7": np.ones((1, 2, 2, 1))}, partial, metadata)
    for path, message in (
        (truncated, "not a readable safetensors file"),
        (garbage, "not a readable safetensors file"),
        (foreign, "was not written by this version"),
        (partial, "does not hold what tnmoe.save writes"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.load(path)
    with pytest.raises(FileNotFoundError):
        tn.load(tmp_path / "missing")


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="expected an MPO or a SharedMPO, got ndarray"):
        tn.save(tmp_path / "x", np.ones(3))
    tn.save(tmp_path / "x", example("bfloat16", "MPO", "torch"))
    with pytest.raises(tn.InputError, match="bfloat16, which NumPy lacks"):
        tn.load(tmp_path / "x", library="numpy")
    with pytest.raises(tn.InputError, match="library must be one of numpy, torch, got 'jax'"):
        tn.load(tmp_path / "x", library="jax")
