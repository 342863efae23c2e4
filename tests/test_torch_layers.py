import pytest
import torch as th

from sb3_mpg.common.torch_layers import ELU


@pytest.mark.parametrize("scale", [0.1, 1.0, 200.0])
def test_elu_is_torchs_with_and_without_gradient(scale):
    inputs = scale * th.randn(64, 32)
    expected = th.nn.functional.elu(inputs)
    with th.no_grad():
        overwritten = inputs.clone()
        outputs = ELU()(overwritten)
    assert outputs.data_ptr() == overwritten.data_ptr()
    th.testing.assert_close(outputs, expected, rtol=0, atol=2e-7)

    leaf = inputs.clone().requires_grad_()
    outputs = ELU()(1.0 * leaf)
    assert th.equal(outputs, expected)
    (gradient,) = th.autograd.grad(outputs.sum(), leaf)
    th.testing.assert_close(gradient, th.where(inputs > 0, 1.0, inputs.exp()), rtol=0, atol=2e-7)


def test_elu_hides_nothing_that_is_not_finite():
    with th.no_grad():
        outputs = ELU()(th.tensor([th.nan, th.inf, -th.inf]))
    assert outputs[0].isnan() and outputs[1] == th.inf and outputs[2] == -1
