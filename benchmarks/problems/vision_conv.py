"""A residual network of 3 × 3 convolutions on digits.

It has GroupNorm and no BatchNorm: a benchmark's loss is a function of parameters and a batch alone,
which has no room for running statistics, and K-FAC's factors are means over single examples, which
BatchNorm would mix."""

from benchmarks.problems import Problem
from benchmarks.problems.digits import classifier
from benchmarks.problems.nnx_networks import adam_for, functions, size

STEM, LAST, GROUPS = 16, 32, 4


def network(rngs):
    """A stem and two residual blocks, each of half the resolution before it."""
    from flax import nnx

    def conv(inputs, outputs, side=3, strides=1):
        shape = (side, side)
        return nnx.Conv(inputs, outputs, shape, strides=strides, use_bias=False, rngs=rngs)

    def norm(channels):
        return nnx.GroupNorm(channels, num_groups=GROUPS, rngs=rngs)

    class Block(nnx.Module):
        def __init__(self, inputs, outputs, strides):
            self.conv_1, self.norm_1 = conv(inputs, outputs, strides=strides), norm(outputs)
            self.conv_2, self.norm_2 = conv(outputs, outputs), norm(outputs)
            self.shortcut = conv(inputs, outputs, 1, strides)

        def __call__(self, x):
            h = nnx.relu(self.norm_1(self.conv_1(x)))
            h = self.norm_2(self.conv_2(h))
            return nnx.relu(h + self.shortcut(x))

    class ResNet(nnx.Module):
        def __init__(self):
            self.stem, self.norm = conv(1, STEM), norm(STEM)
            self.blocks = nnx.List([Block(STEM, STEM, 2), Block(STEM, LAST, 2)])
            self.head = nnx.Linear(LAST, 10, rngs=rngs)

        def __call__(self, images):
            x = nnx.relu(self.norm(self.stem(images.reshape(-1, 8, 8, 1))))
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((1, 2)))

    return ResNet()


def problem() -> Problem:
    init, predict = functions(network)
    return classifier(
        f"nnx ResNet of a stem and two blocks of 3 × 3 convolutions ({STEM} and {LAST} channels, "
        f"GroupNorm, relu; {size(init)} parameters)",
        init,
        predict,
        steps=150,
        batch=64,
        evaluate_every=10,
        adam_for=adam_for,
    )
