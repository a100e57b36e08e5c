"""The only place that knows the inside of `nn.Module`s: layers as matrices, and what passes through them."""
