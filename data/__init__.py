"""The handwriting that the notebooks learn from: MNIST as tensors, checked, with a stand-in where it cannot be had.

Two lines are enough::

    mnist = load_mnist()                # mnist.name and mnist.real say which data set it is
    x = inputs(mnist.train_images)      # (60000, 784) float32, from -1 to 1

Importing this package needs torch alone; torchvision and scikit-learn are loaded only when they are called for.
"""

from data.mnist import Images, inputs, load_mnist

__all__ = ["Images", "inputs", "load_mnist"]
