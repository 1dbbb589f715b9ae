import torch


def turn(x, positions, theta=1e6):
    half = x.shape[1] // 2
    frequency = theta ** (-torch.arange(half).double() / half)
    z = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.exp(1j * positions[:, None].double() * frequency)
    return torch.cat([z.real, z.imag], dim=1).to(x.dtype)
