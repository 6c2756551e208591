"""Images: from a file to a tensor, the digits of the experiments, folders and streams to train on."""
