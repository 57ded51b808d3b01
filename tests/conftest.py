"""Every test runs on one CPU thread, without network, and with the shapes in annotations checked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONHASHSEED"] = "0"
# Hundreds of tests start a command of ours; where bytecode is not kept, each would compile our sources anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from jaxtyping import install_import_hook

# Before anything else imports the modules: from here on `Float[Tensor, "b n c"]` is a check, not a comment.
_SHAPED = ("plugins", "core.layers", "core.metrics", "core.text")
_hook = install_import_hook(list(_SHAPED), "shape_check.checked")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("repro", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("repro")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_leftover_gin():
    """Each test starts from an empty gin config."""
    import gin

    with gin.unlock_config():
        gin.clear_config()
    yield
    with gin.unlock_config():
        gin.clear_config()
