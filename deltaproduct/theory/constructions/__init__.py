"""How weights are written: a circuit of slots, heads and look-ups, and one construction a file that fills it."""
