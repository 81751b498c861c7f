import torch
def affine_relu(x, scale, shift, *, relu=True):
    y = x * scale[:, None, None] + shift[:, None, None]
    return y.relu() if relu else y
def affine_relu_cat(parts, scale, shift, *, relu=True):
    return affine_relu(torch.cat(list(parts), 1), scale, shift, relu=relu)
