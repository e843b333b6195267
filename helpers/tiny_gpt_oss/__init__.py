"""The embedded model: a folder of weights (see README.md), and the recipe that made them.

`worlds` invents entities and facts, `curriculum` writes passages and questions about them, `tokenizer` and `train` make
the model, `measure` says how well it reads. Nothing here is needed to use the model: transformers loads the folder.
"""
