"""One thread, and the shapes in annotations checked while the tests run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from jaxtyping import install_import_hook

_hook = install_import_hook("token_merging", "beartype.beartype")
