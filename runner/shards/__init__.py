"""Data sets in shards at any fsspec path, read in blocks, by record number.

A *manifest* lists how many records every shard has and where its blocks begin. So any record takes one ranged read, and
a resume reads nothing to find its position. ``Records`` and ``Tokens`` are map-style data sets over a manifest;
``Packed`` concatenates documents into rows. Nothing here knows of epochs, orders or runs.
"""
