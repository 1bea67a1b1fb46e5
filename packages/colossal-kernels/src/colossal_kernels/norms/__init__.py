"""Normalisations over the last dimension, alone and with the residual addition before them."""
