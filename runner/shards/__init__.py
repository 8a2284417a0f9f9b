"""Map-style data sets over sharded files at any fsspec path.

A *manifest* lists the record count of every shard and the offsets of its blocks. So reading a record takes one ranged
read, and a resume reads nothing to find its position. ``Records`` and ``Tokens`` are data sets over a manifest;
``Packed`` joins documents into rows. This package does not know of epochs, orders or runs.
"""
