"""Stores: prepared samples in mapped files, so that more of them than fit into memory can be trained on."""
