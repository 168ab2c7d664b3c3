"""Small tensors of several dtypes, an empty one and a scalar among them."""

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)


def tensors():
    torch.manual_seed(0)
    made = {f"t{i}": torch.randn(3, i + 1).mul(9).to(dtype) for i, dtype in enumerate(DTYPES)}
    return made | {"flag": torch.tensor([True, False]), "scalar": torch.tensor(2.0),
                   "empty": torch.zeros(0, 4)}  # fmt: skip
