"""transformers' ``Conv1D`` (GPT-2): a dense linear that stores its weight as ``[in, out]``."""

from transformers.pytorch_utils import Conv1D

from fadapt.bases.dense import Dense
from fadapt.bases.protocol import register_base


def _read(module: Conv1D) -> Dense:
    return Dense(module.weight.detach().mT, module.bias.detach(), transposed=True)


register_base(Conv1D, _read)
