"""Checkpoints under a location: written once, sealed with a checksum, verified before any byte is used.

data/s000001200-a000007-<nonce>.<part>.safetensors     tensors
commits/a000007-s000001200-<nonce>.json                the commit: a sealed manifest, put after its data
"""
