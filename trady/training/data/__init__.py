"""Data sets of labelled images, as batches.

A data format is one file and one line below.
"""

from trady.training.data.fashion_mnist import FASHION_MNIST
from trady.training.data.image_folder import IMAGE_FOLDER
from trady.training.data.npz import NPZ
from trady.training.data.source import register_data_format

register_data_format(FASHION_MNIST)
register_data_format(NPZ)
register_data_format(IMAGE_FOLDER)
