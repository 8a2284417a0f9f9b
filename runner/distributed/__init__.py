"""What a process of a run is to the others: which one it is, how they agree, who watches over whom.

One process alone has the same objects, in their trivial form. Only what several processes need imports
``torch.distributed`` further than torch itself does, and only once there are several.
"""
