import torch


def mask(branches):
    earlier = torch.ones(len(branches), len(branches), dtype=torch.bool).tril()
    return earlier & ((branches == 0) | (branches == branches[:, None]))
