"""A model as data: what it is made of, its tensors, what a sequence keeps, and the families that say so.

``spec`` holds the records, ``tensors`` the one list of a layer's tensors, ``state`` what a sequence keeps,
``families`` one file a family, ``registry`` finds the family of a checkpoint.
"""
