"""Writes state_dict.bin with torch.save (PyTorch 2.11): python3 make_state_dict.py

Every tensor starts as 0, 1/4, 2/4, ... (exact in every dtype), so that a test can tell what it must read.
"""

import torch


def ramp(*shape, dtype=torch.float32):
    count = torch.Size(shape).numel()
    return (torch.arange(count) / 4).reshape(shape).to(dtype)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5)
        self.embed.weight = torch.nn.Parameter(ramp(5, 4))
        self.head.weight = self.embed.weight  # tied
        self.head.bias = torch.nn.Parameter(ramp(5))
        self.register_buffer("steps", torch.tensor([7]))


state = Model().state_dict()  # an OrderedDict with _metadata
base = ramp(4, 6)
state["half"] = ramp(3, 2, dtype=torch.float16)
state["bfloat16"] = ramp(3, 2, dtype=torch.bfloat16)
state["base"] = base
state["transposed"] = base.t()
state["rows"] = base[1:3]
state["strided"] = base[1:, ::2]
state["parameter"] = torch.nn.Parameter(ramp(2))
state["empty"] = torch.empty(0, 3)
state["scalar"] = torch.tensor(0.25)
state["comment"] = ("not a tensor", 1.5, -3, 2**40, None, True)
torch.save(state, "state_dict.bin")
