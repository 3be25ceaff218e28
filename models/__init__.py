"""Networks and their layers: the zoo, checkpoints, taps on layers, hint candidates."""
