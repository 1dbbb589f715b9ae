"""8. When are 4 micro-batches one large batch?

The gradient of a step must not depend on how its pages were split. Each micro-batch gives you the *sum* of its tokens'
losses; add up the step's loss.

Hint: divide every sum by the tokens of the whole step, not by its own. Averages of averages are right only where all
micro-batches have equally many tokens. See the optimizer step in the loop of train.py.
"""
import torch


def accumulate(micro_batches, loss_sum):
    """Call backward once a micro-batch, and return the step's loss per token.

    `micro_batches`: lists of targets, one number a token. `loss_sum(targets)`: a differentiable sum over the tokens.
    """
    raise NotImplementedError("write me")


def test_the_split_does_not_matter():
    weight, targets = torch.tensor(2.0, requires_grad=True), [1.0, 5.0, -3.0, 0.5, 8.0, 2.0, 4.0]
    found = []
    for cuts in ([7], [1, 6], [3, 3, 1], [1] * 7):
        weight.grad = None
        batches = [part.tolist() for part in torch.tensor(targets).split(cuts)]
        loss = accumulate(batches, lambda values: sum((weight - value) ** 2 for value in values))
        found.append((float(loss), weight.grad.item()))
    expected = sum((2 - t) ** 2 for t in targets) / 7, sum(2 * (2 - t) for t in targets) / 7
    for loss, gradient in found:
        assert abs(loss - expected[0]) < 1e-5 and abs(gradient - expected[1]) < 1e-5
