"""The model, one idea a file, in the order of the chapters."""
