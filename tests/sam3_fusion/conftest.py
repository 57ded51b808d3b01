import pytest
from jaxtyping import config


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """Annotations are comments, as they are for users: what is wrong with a shape has to be said by the modules."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)
