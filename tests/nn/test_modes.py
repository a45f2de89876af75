"""`evaluating` leaves every module in the mode it was in."""

import pytest
from torch import nn

from proxbit.nn import evaluating


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_each_module_goes_back_to_its_own_mode(fails):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, False, False]
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == before
