"""`fastmim.load` and the exports: from checkpoints of other libraries to fastmim's models, and back.

- `load`: fastmim.load, from a file or a directory to a model.
- `files`: read files without running anything in them; describe files of other kinds.
- `encoders`: find the encoder in the content of a file.
- `facebook`, `huggingface`, `timm`, `lightly`, `videomae`: parameter names and exports of each library.
- `backbones`, `vit_names`: encoders as Hugging Face's models, and its names of a ViT.
- `weights`: settings from weights, checks of names and shapes, and assembly of a model.
- `grids`: the grid of a position table, and interpolation to another.
"""
