"""What the tests of commands share."""

import pytest
import torch


@pytest.fixture
def threads_restored():
    """Commands set the number of torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
