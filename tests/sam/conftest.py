import pytest

from plugins.sam.rgbd_sample import rgbd_sample


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A generated sample, shared: nobody may write to it but for its cache of text."""
    root = tmp_path_factory.mktemp("rooms") / "NYU"
    rgbd_sample(str(root), train=10, test=3, height=32, width=48)
    return root
