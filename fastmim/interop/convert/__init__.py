"""`fastmim.load` and the exports: checkpoints of other libraries to `MaskedAutoencoderViT` and back.

load.py                                         fastmim.load: from a file or a directory to a model
files.py                                        read files safely, and name files of other kinds
encoders.py                                     find the encoder in the content of a file
facebook.py huggingface.py timm.py lightly.py   parameter names of each library, and the exports
weights.py                                      settings from weights, checks of names and shapes, assembly
grids.py                                        the grid of a position table, and resizing to another
"""
