"""The POPE metric; `evaluate.load` takes this folder."""
