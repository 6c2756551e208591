__version__ = "0.1.0"  # in a file of its own, so that building a package need not import torch
