"""Data in shards behind fsspec: files read in blocks, by record number.

A *manifest* knows how many records every shard has and where its blocks begin, so any record is one ranged read away
and nothing has to be read to find a position again. ``Records`` and ``Tokens`` are map-style data sets over it;
``Packed`` lays documents end to end. Nothing here knows of epochs, orders or runs.
"""
