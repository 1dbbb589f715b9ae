from einops import reduce
from torch import nn

from model.layers import Linear


class MyProjector(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.grid = config.vision.grid
        self.out = Linear(config.vision.width, config.language.width)

    def forward(self, patches):
        return self.out(reduce(patches, "n (h rh w rw) d -> n (h w) d", "mean", w=self.grid // 2, rh=2, rw=2))
