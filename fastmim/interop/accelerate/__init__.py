"""`fastmim.accelerate`: run the modules of other libraries on fastmim's kernels, in place.

api.py                                       accelerate, restore, explain
swap.py                                      change the class of an instance, and back
facebook.py huggingface.py timm.py lightly.py   the replacements for each library, and `choose`, which picks them
recognise.py                                 checks that a method computes what its replacement does
stock.py                                     predicates on the parts of a module
layers.py                                    arithmetic that the replacements share
"""
