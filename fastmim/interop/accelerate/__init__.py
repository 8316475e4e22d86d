"""`fastmim.accelerate`: run the modules of other libraries on fastmim's kernels, in place.

- `api`: accelerate, restore and explain.
- `swap`: change the class of an instance, and back.
- `facebook`, `huggingface`, `videomae`, `timm`, `lightly`: the replacements for each library; `choose` picks them for a
  module.
- `recognise`: checks that a method computes what its replacement does.
- `stock`: predicates on the parts of a module.
- `layers`: arithmetic that the replacements share.
"""
