"""No test may leave a level of forward-mode AD or of torch.func behind: it would break later ones.

``torch.compile`` of a ``jvp`` that its backend refuses does (torch 2.13), and every later jvp in
the process then fails with an error about nested levels.
"""

import os
import tempfile

# Each process of `pytest -n` has a thread for every core. One that waits for its fellows would keep
# a core busy that another process needs: tests of small operations took up to twenty times as long.
# The number of threads stays. Read when torch is first imported, and by each child process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# numba's cache does not notice a change of a file that a compiled one imports: compile anew, once
# for all processes.
if "NUMBA_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory()
    os.environ["NUMBA_CACHE_DIR"] = _compiled.name

import pytest
import torch
from torch._functorch import eager_transforms

functorch = torch._C._functorch
# A script, which test_custom_loop.py runs in a folder of its own; doctests would import it here.
collect_ignore = ["example_training_loop.py"]


def leaked() -> list[str]:
    """What is left open, which is then closed."""
    found = []
    while functorch.peek_interpreter_stack() is not None:
        found.append(f"torch.func level {functorch.peek_interpreter_stack().level()}")
        functorch.pop_dynamic_layer_stack()
    if eager_transforms.JVP_NESTING:
        found.append("torch.func's count of jvps")
        eager_transforms.JVP_NESTING = 0
    try:
        torch._C._enter_dual_level()
    except RuntimeError:  # there is only one level, and it is taken
        found.append("the level of forward-mode AD")
    torch._C._exit_dual_level(0)
    torch.autograd.forward_ad._current_level = -1
    return found


@pytest.fixture(autouse=True)
def no_level_left_open():
    yield
    found = leaked()
    assert not found, f"this test leaves open: {', '.join(found)}"
