"""What is measured of each op, in a file of the op's name: `BENCH`. Letters: N rows, D features, E bytes of one activation."""
