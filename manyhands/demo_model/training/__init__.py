"""How the embedded model was made; see `train.py` one folder up."""
